"""The weights of rows from one kernel, in Triton's interpreter, against those of torch and against the bound itself."""

from collections.abc import Iterator
from fractions import Fraction
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fsdp_dp import clipping
from fsdp_dp.clipping import RowTotals, RowWeights, row_weights
from fsdp_dp.norm_terms import NormTerms, TermsOfGroups
from tests.unit.interpreted import interpreter

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def kernel() -> Iterator[ModuleType]:
    with interpreter():
        from fsdp_dp.kernels import row_weights as module

        yield module


def by_both(
    monkeypatch: pytest.MonkeyPatch, terms: NormTerms | TermsOfGroups, mask_B: Tensor, **options: object
) -> tuple[RowWeights, RowWeights]:
    totals = [RowTotals.zeros(mask_B) for _ in range(2)]
    for x in totals:
        x.norm_sq_B[:1], x.dropped_B[1:3] = 2.0, True
    reference = row_weights(terms, mask_B, dtype=torch.float32, totals=totals[0], **options)  # type: ignore[arg-type]
    monkeypatch.setattr(clipping, "_has_kernel", lambda mask_B, dtype: True)
    found = row_weights(terms, mask_B, dtype=torch.float32, totals=totals[1], **options)  # type: ignore[arg-type]
    torch.testing.assert_close(totals[1].norm_sq_B, totals[0].norm_sq_B, rtol=1e-14, atol=0, equal_nan=True)
    assert torch.equal(totals[1].dropped_B, totals[0].dropped_B)
    return found, reference


def spread_terms(count: int) -> NormTerms:
    uniform = torch.rand(3, count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    norm_sq = 2.0 ** (-60 + 120 * uniform[0])
    return NormTerms(norm_sq=norm_sq, error=norm_sq * uniform[1], rounding_sq=norm_sq * uniform[2] * 1e-3)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("numerics", ["certified", "nominal"])
@pytest.mark.parametrize("clip_function, stability", [("abadi", 0.0), ("automatic", 0.01), ("normalized", 0.0)])
@pytest.mark.parametrize("bound, loss_factor", [(1e-3, 1), (0.7300000000000001, 16)])
def test_as_in_torch(
    numerics: str,
    clip_function: str,
    stability: float,
    bound: float,
    loss_factor: int,
    kernel: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More rows than a program has; some are masked, some cannot be measured, some have no gradient.

    Seen to fail when the bound travels in float32, when weights are rounded to nearest, and when the mask is left out.
    """
    terms = spread_terms(300)
    terms.norm_sq[:7] = torch.tensor([NAN, INF, 0.0, 1e-300, 1.0, 1.0, 2.0**200], dtype=torch.float64)
    terms.error[:7] = torch.tensor([0.0, 0.0, 0.0, 0.0, INF, 0.0, 0.0], dtype=torch.float64)
    terms.rounding_sq[5] = NAN
    mask_B = torch.arange(300) % 5 != 4
    found, expected = by_both(
        monkeypatch, terms, mask_B, bound=bound, loss_factor=loss_factor, numerics=numerics,
        clip_function=clip_function, stability=stability,
    )  # fmt: skip
    assert torch.equal(found.keep_B, expected.keep_B)
    assert torch.equal(found.weight_B, expected.weight_B)
    torch.testing.assert_close(found.norm_B, expected.norm_B, rtol=1e-15, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("numerics", ["certified", "nominal"])
@pytest.mark.parametrize("rows", [1, 40])
def test_groups_that_are_weighed_together_have_the_weights_that_each_has_alone(
    rows: int, numerics: str, kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many measurements, of one, of none; what cannot be measured in one group leaves the others alone.

    Seen to fail when a group reads the entries of the one before it, and when it has that one's bound.
    """
    owners = (2, 0, 0, 3) + (2,) * 20
    each = [spread_terms(rows + number) for number in range(len(owners))]
    terms = torch.stack([x.stack()[:, :rows] for x in each])
    terms[1, 0, 0] = NAN
    measured = TermsOfGroups(terms_n3B=terms, owners=owners, groups=4)
    options = {"loss_factor": 3, "numerics": numerics}
    bounds = (0.3, 0.7, 20.0, 1e-4)
    mask_B = torch.arange(rows) % 7 != 6
    found, expected = by_both(monkeypatch, measured, mask_B, bound=bounds, **options)
    monkeypatch.undo()
    assert torch.equal(found.keep_B, expected.keep_B) and not found.keep_B[0, 0] and bool(found.keep_B[1, 0])
    torch.testing.assert_close(found.weight_B, expected.weight_B, rtol=2e-7, atol=0)
    torch.testing.assert_close(found.norm_B, expected.norm_B, rtol=1e-14, atol=0, equal_nan=True)
    for group, bound in enumerate(bounds):
        own = [x for x, owner in zip(terms, owners, strict=True) if owner == group]
        alone = NormTerms.unstack(torch.stack(own).sum(0)) if own else NormTerms.zeros(rows, mask_B.device)
        chosen = row_weights(alone, mask_B, bound=bound, dtype=torch.float32, **options)  # type: ignore[arg-type]
        assert torch.equal(expected.keep_B[group], chosen.keep_B)
        assert torch.equal(expected.weight_B[group], chosen.weight_B)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("loss_factor", [1, 3, 1000])
def test_no_row_contributes_more_than_the_bound(
    loss_factor: int, kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `test_clipping` has it, in rational arithmetic. Seen to fail when weights are rounded to nearest."""
    terms, bound = spread_terms(500), 7.3
    terms.rounding_sq.zero_()
    monkeypatch.setattr(clipping, "_has_kernel", lambda mask_B, dtype: True)
    chosen = row_weights(
        terms, torch.ones(500, dtype=torch.bool), bound=bound, loss_factor=loss_factor, numerics="certified",
        dtype=torch.float32,
    )  # fmt: skip
    for norm_sq, error, weight in zip(
        terms.norm_sq.tolist(), terms.error.tolist(), chosen.weight_B.tolist(), strict=True
    ):
        assert Fraction(weight) ** 2 * (Fraction(norm_sq) + Fraction(error)) <= Fraction(bound) ** 2
