"""From norms to weights: what one row can do is bounded exactly, in rational arithmetic.

A docstring says "Seen to fail" where the property was broken on purpose and the test was seen to find it.
"""

import importlib.util
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fsdp_dp.clipping import abadi_weights, certified_norm, nominal_norm, round_down, row_weights
from fsdp_dp.gradients import OuterProduct
from fsdp_dp.norm_terms import NormTerms

NAN, INF = float("nan"), float("inf")


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def terms(norm_sq: Tensor, error: Tensor | None = None, rounding_sq: Tensor | None = None) -> NormTerms:
    zero = torch.zeros_like(norm_sq)
    return NormTerms(
        norm_sq=norm_sq,
        error=zero if error is None else error,
        rounding_sq=zero if rounding_sq is None else rounding_sq,
    )


def spread(count: int, seed: int, low: float, high: float) -> Tensor:
    """Numbers between ``2^low`` and ``2^high``, evenly in the exponent."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 2.0 ** (low + (high - low) * uniform)


# ---------------------------------------------------------------------------------------------------------- norms


def test_certified_norm_adds_the_error_under_the_root_and_the_rounding_outside() -> None:
    """Under one root with the rest, the rounding of a row with a small norm would be understated."""
    found = certified_norm(terms(column(9.0, 0.0, 0.0), column(16.0, 0.0, 4.0), column(4.0, 9.0, 0.0)))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([7.0, 3.0, 2.0], rel=1e-11)


def test_nominal_norm_is_the_computed_norm() -> None:
    found = nominal_norm(terms(column(9.0, -1e-9, 0.0), column(16.0, 1.0, 0.0), column(4.0, 9.0, 0.0)))
    assert found.tolist() == [3.0, 0.0, 0.0]


def test_certified_norm_bounds_the_exact_one() -> None:
    """Its own float64 arithmetic included, as a square in rational numbers: where there is no rounding term."""
    norm_sq, error = spread(2000, 1, -80, 80), spread(2000, 2, -120, 60)
    found = certified_norm(terms(norm_sq, error))
    for n, e, certified in zip(norm_sq.tolist(), error.tolist(), found.tolist(), strict=True):
        assert Fraction(certified) ** 2 >= Fraction(n) + Fraction(e)
        assert Fraction(certified) ** 2 <= (Fraction(n) + Fraction(e)) * (1 + Fraction(1, 2**36))


@pytest.mark.parametrize("parameters", [1, 30, 1000])
def test_sums_over_many_parameters_lose_nothing(parameters: int) -> None:
    """Each term is too small to change the sum, together they matter; the bound is where rounding decides.

    Seen to fail without the last factor of `certified_norm`.
    """
    total = terms(column(1.0))
    for _ in range(parameters):
        total = total + terms(column(2.0**-54))
    exact = 1 + Fraction(parameters, 2**54)
    mask = torch.ones(1, dtype=torch.bool)
    for bound in (1.0, 0.5, 1 - 2.0**-53, 1 + 2.0**-52):
        chosen = row_weights(total, mask, bound=bound, loss_factor=1, numerics="certified", dtype=torch.float64)
        assert Fraction(chosen.weight_B.item()) ** 2 * exact <= Fraction(bound) ** 2


# -------------------------------------------------------------------------------------------------------- weights


def test_abadi_weights() -> None:
    weights = abadi_weights(column(0.0, 0.5, 1.0, 2.0, 1e300), 1.0)
    assert weights[:3].tolist() == [1.0, 1.0, 1.0]
    assert weights[3:].tolist() == pytest.approx([0.5, 1e-300], rel=1e-12)


@pytest.mark.parametrize("bound", [1e-30, 0.1, 1.0, 3.0, 1e30])
def test_weight_times_norm_is_at_most_the_bound(bound: float) -> None:
    """Exactly. Seen to fail with ``bound / norm`` rounded to nearest."""
    norm = bound * spread(3000, 3, -3, 40)
    for n, weight in zip(norm.tolist(), abadi_weights(norm, bound).tolist(), strict=True):
        assert Fraction(weight) * Fraction(n) <= Fraction(bound)
        assert weight >= min(1.0, bound / n) * (1 - 2.0**-48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_down_is_the_largest_number_below(dtype: torch.dtype) -> None:
    """Over the whole range, denormals and numbers beyond the format included."""
    exact = torch.tensor([0.0, 1.0, 2.0**-149, 2.0**-126, 0.1, 1e300], dtype=torch.float64)
    x = torch.cat([exact, spread(5000, 4, -170, 140)])
    found = round_down(x, dtype)
    assert found.dtype == dtype
    assert (found.double() <= x).all()
    assert (torch.nextafter(found, torch.full_like(found, INF)).double() > x).all()


# --------------------------------------------------------------------------------------------------- row weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss_factor", [1, 3, 16, 1000])
@pytest.mark.parametrize("bound", [1e-3, 1.0, 7.3])
def test_no_row_contributes_more_than_the_bound(dtype: torch.dtype, loss_factor: float, bound: float) -> None:
    """``weight * |G| <= bound`` for the recorded G, whose row's own gradient is ``loss_factor`` times it.

    Seen to fail when weights are rounded to nearest in float32, and when the loss factor is left out of the norm.
    """
    norm_sq = spread(1000, 5, -30, 60)
    mask = torch.ones(1000, dtype=torch.bool)
    chosen = row_weights(terms(norm_sq), mask, bound=bound, loss_factor=loss_factor, numerics="certified", dtype=dtype)
    assert chosen.weight_B.dtype == dtype
    for n, weight in zip(norm_sq.tolist(), chosen.weight_B.tolist(), strict=True):
        assert Fraction(weight) ** 2 * Fraction(n) <= Fraction(bound) ** 2
        ideal = min(loss_factor, bound / math.sqrt(n))
        assert weight == pytest.approx(ideal, rel=2e-7 if dtype == torch.float32 else 1e-11)


def test_error_and_rounding_count_in_certified_only() -> None:
    uncertain = terms(column(1.0), column(3.0), column(0.25))
    mask = torch.ones(1, dtype=torch.bool)
    weights = {
        numerics: row_weights(
            uncertain, mask, bound=1.0, loss_factor=1, numerics=numerics, dtype=torch.float64
        ).weight_B.item()
        for numerics in ("certified", "nominal")
    }
    assert weights["certified"] == pytest.approx(1 / 2.5, rel=1e-11)
    assert weights["nominal"] == 1.0


@pytest.mark.parametrize("numerics", ["certified", "nominal"])
def test_padding_and_non_finite_rows_get_zero_and_are_dropped(numerics: str) -> None:
    """Rule 11. A NaN must not pass through a minimum and come out as a weight."""
    norm_sq = column(4.0, NAN, INF, 4.0, 4.0, 0.0)
    mask = torch.tensor([True, True, True, False, True, True])
    chosen = row_weights(terms(norm_sq), mask, bound=1.0, loss_factor=2, numerics=numerics, dtype=torch.float32)
    assert chosen.keep_B.tolist() == [True, False, False, False, True, True]
    assert chosen.weight_B[~chosen.keep_B].tolist() == [0.0, 0.0, 0.0]
    assert chosen.weight_B[chosen.keep_B].tolist() == pytest.approx([0.5, 0.5, 2.0], rel=1e-6)
    assert chosen.norm_B[[0, 3, 4, 5]].tolist() == [4.0, 4.0, 4.0, 0.0]  # what is reported: the row's own norm
    assert not chosen.norm_B[1:3].isfinite().any()


@pytest.mark.parametrize("part", ["error", "rounding_sq"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_an_error_without_bound_drops_the_row(part: str, bad: float) -> None:
    """`gamma` is infinite for sums too long to say anything about; such a row is not trusted."""
    uncertain = terms(column(1.0, 1.0), **{part: column(0.0, bad)})
    chosen = row_weights(
        uncertain, torch.ones(2, dtype=torch.bool), bound=1.0, loss_factor=1, numerics="certified", dtype=torch.float32
    )
    assert chosen.keep_B.tolist() == [True, False]
    assert chosen.weight_B[1] == 0


def test_a_norm_of_zero_has_weight_one() -> None:
    chosen = row_weights(
        NormTerms.zeros(2, torch.device("cpu")),
        torch.ones(2, dtype=torch.bool),
        bound=0.1,
        loss_factor=1,
        numerics="certified",
        dtype=torch.float32,
    )
    assert chosen.weight_B.tolist() == [1.0, 1.0]


# ------------------------------------------------------------------------------- why the field's practice is unsafe


def cancelling_row() -> tuple[Tensor, Tensor]:
    """One row of bfloat16 tokens ``[1, T, 1]`` whose gradient is 1/2 and whose tokens sum to 1020 in absolute value.

    All tokens have the input 1. 510 output gradients are 1, 340 are -1.5, one is 1/2.
    """
    g = torch.cat([torch.full((510,), 1.0), torch.full((340,), -1.5), torch.tensor([0.5])]).to(torch.bfloat16)
    return torch.ones(1, g.numel(), 1, dtype=torch.bfloat16), g.view(1, -1, 1)


def test_folding_the_clip_factor_into_bfloat16_breaks_the_bound() -> None:
    """The field's usual practice, against this library's on the same row and the same R (docs/numerics.md).

    With c = R / n exactly, rounding c * 1 up and c * 1.5 down in bfloat16 leaves a sum of several R: errors of up to
    2^-8 of each token add up to far more than the gradient itself.
    """
    a, g = cancelling_row()
    norm = (g.double().mT @ a.double()).norm()
    assert norm == 0.5
    worst, ours = 0.0, 0.0
    for bound in torch.linspace(0.25, 0.5, 129).tolist():
        folded = (g * torch.tensor(bound / norm.item())).to(torch.bfloat16)
        worst = max(worst, ((folded.float().mT @ a.float()).norm() / bound).item())
        gradient = OuterProduct(a, g)
        chosen = row_weights(
            gradient.norm_terms(),
            torch.ones(1, dtype=torch.bool),
            bound=bound,
            loss_factor=1,
            numerics="certified",
            dtype=torch.float32,
        )
        ours = max(ours, (gradient.weighted_sum(chosen.weight_B, chosen.keep_B).double().norm() / bound).item())
    assert worst > 4.6
    assert 0.8 < ours <= 1


def test_the_documented_demonstration_shows_it() -> None:
    """`scripts/measure_inflation.py`, from which docs/numerics.md quotes, on the same kind of row."""
    path = Path(__file__).resolve().parents[2] / "scripts" / "measure_inflation.py"
    spec = importlib.util.spec_from_file_location("measure_inflation", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    table = list(script.folding_rows())
    folded, certified = (float(row.split("|")[2]) for row in table[-2:])
    assert folded > 4.6 and certified <= 1
