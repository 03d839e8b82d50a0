"""Kernels launched the short way, which only a GPU has: a second launch of the same shapes, with other values."""

import pytest
import torch

from fsdp_dp.kernels import outer

pytestmark = pytest.mark.gpu(1)


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
        norms.add(a, [g])
        terms = norms.terms().sum(0)
        exact_sq = (g.double().mT @ a.double()).square().sum((1, 2))
        assert ((terms[0] - exact_sq).abs() <= terms[1]).all()
