"""Kernels launched the short way, which only a GPU has: a second launch of the same shapes, with other values."""

import pytest
import torch

from fsdp_dp.clipping import RowTotals, row_weights
from fsdp_dp.kernels import outer
from fsdp_dp.norm_terms import NormTerms

pytestmark = pytest.mark.gpu(count=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_kernel_that_was_launched_before_computes_the_same(dtype: torch.dtype) -> None:
    if not outer._runs_on(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("the kernels are for Hopper")
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        a, g = (torch.randn(2, 96, width, generator=generator, device="cuda").to(dtype) for width in (128, 192))
        weight = torch.rand(2, generator=generator, device="cuda")
        exact = torch.einsum("b,btp,btd->pd", weight.double(), g.double(), a.double())
        torch.testing.assert_close(outer.weighted_outer(a, g, weight).double(), exact, rtol=1e-4, atol=1e-4)
        norms = outer.GhostNorms(2, a.device)
        norms.add([(a, [g])])
        terms = norms.terms().sum(0)
        exact_sq = (g.double().mT @ a.double()).square().sum((1, 2))
        assert ((terms[0] - exact_sq).abs() <= terms[1]).all()


@pytest.mark.parametrize("clip_function", ["abadi", "automatic", "normalized"])
def test_weights_of_rows_are_those_of_the_cpu(clip_function: str) -> None:
    """Bit for bit, in several groups, some rows of which are masked or cannot be measured."""
    generator = torch.Generator().manual_seed(0)
    found, expected = [], []
    totals = [RowTotals.zeros(torch.ones(300, dtype=torch.bool, device=device)) for device in ("cuda", "cpu")]
    for group in range(3):
        terms = 2.0 ** (120 * torch.rand(3, 300, generator=generator, dtype=torch.float64) - 60)
        terms[0, :4] = torch.tensor([torch.nan, torch.inf, 0.0, 2.0**200], dtype=torch.float64)
        mask = torch.rand(300, generator=generator) > 0.1
        for device, rows, total in (("cuda", found, totals[0]), ("cpu", expected, totals[1])):
            options = {"bound": 0.73 + group, "loss_factor": 16, "numerics": "certified", "dtype": torch.float32}
            rows.append(
                row_weights(
                    NormTerms.unstack(terms.to(device)),
                    mask.to(device),
                    clip_function=clip_function,
                    stability=0.01,
                    totals=total,
                    **options,  # type: ignore[arg-type]
                )
            )
    for mine, its in zip(found, expected, strict=True):
        assert torch.equal(mine.keep_B.cpu(), its.keep_B) and torch.equal(mine.weight_B.cpu(), its.weight_B)
    assert torch.equal(totals[0].dropped_B.cpu(), totals[1].dropped_B)
    torch.testing.assert_close(totals[0].norm_sq_B.cpu(), totals[1].norm_sq_B, rtol=1e-14, atol=0, equal_nan=True)
