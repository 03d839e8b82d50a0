"""Kernels that form the gradient of every row, in Triton's interpreter, against float64: dropped with a bound, or stored.

tests/gpu/test_instantiate_kernels.py has the compiled ones. A docstring says "Seen to fail" where the property was broken on
purpose and the test was seen to find it.

Legend: B rows, T positions, D inputs, P outputs.
"""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fsdp_dp import planner
from fsdp_dp.clipping import certified_norm
from fsdp_dp.gradients import Formed, OuterProduct, _instantiated_norms, settled
from fsdp_dp.kernels import outer
from fsdp_dp.norm_terms import NormTerms
from fsdp_dp.numerics import gamma
from fsdp_dp.together import total_norm_terms, weighted_sums
from tests.unit.interpreted import interpreter

HALVES = (torch.bfloat16, torch.float16)
ROUNDOFF = 2.0**-24  # the interpreter multiplies in float32

# (B, T, D, P): more than a tile and a stretch and less, no multiple of one, one of everything.
SHAPES = [(3, 21, 24, 40), (2, 75, 72, 16), (1, 16, 136, 72), (1, 1, 8, 8)]


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with interpreter():
        from fsdp_dp.kernels import instantiate

        yield instantiate


def factors(B: int, T: int, D: int, P: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(B + T + D + P)
    a, g = (torch.randn(B, T, C, generator=generator).to(dtype) for C in (D, P))
    return a, g


def cancelling(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A key projection: inputs share a large mean, output gradients add up to nearly zero."""
    return (0.01 * a + a[:, :1]).to(a.dtype), (g - g.float().mean(1, keepdim=True)).to(g.dtype)


def exact(a: Tensor, g: Tensor) -> Tensor:
    return (g.double().mT @ a.double()).square().sum((1, 2))


def terms_of(kernels: ModuleType, *pairs: tuple[Tensor, Tensor]) -> NormTerms:
    return NormTerms.unstack(kernels.norm_terms(pairs, ROUNDOFF).sum(0))


# ------------------------------------------------------------------------------------------------- formed and dropped


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("adverse", [False, True], ids=["independent", "cancelling"])
@pytest.mark.parametrize("shape", SHAPES)
def test_norms(shape: tuple[int, int, int, int], adverse: bool, dtype: torch.dtype, kernels: ModuleType) -> None:
    """Seen to fail when the tiles of a row start where those of the row before do."""
    a, g = factors(*shape, dtype)
    if adverse:
        a, g = cancelling(a, g)
    terms = terms_of(kernels, (a, g))
    assert ((terms.norm_sq - exact(a, g)).abs() <= terms.error).all()
    assert (certified_norm(terms) >= exact(a, g).sqrt()).all()
    if not adverse:
        torch.testing.assert_close(terms.norm_sq, exact(a, g), rtol=1e-6, atol=0)
        assert (certified_norm(terms) <= 1.001 * exact(a, g).sqrt()).all()


def test_terms_of_one_stretch_are_about_those_of_the_reference(kernels: ModuleType) -> None:
    """Seen to fail when the accumulation of the product is not charged."""
    for dtype in HALVES:
        a, g = cancelling(*factors(2, 32, 48, 40, dtype))
        found, reference = terms_of(kernels, (a, g)), _instantiated_norms(a, g)
        torch.testing.assert_close(found.norm_sq, reference.norm_sq, rtol=1e-3, atol=0)
        assert (found.error >= 0.9 * reference.error).all() and (found.error <= 1.1 * reference.error).all()
        torch.testing.assert_close(found.rounding_sq.sqrt(), reference.rounding_sq.sqrt(), rtol=0.4, atol=0)


@pytest.mark.parametrize("adverse", [False, True], ids=["independent", "cancelling"])
def test_the_bound_of_several_stretches(adverse: bool, kernels: ModuleType) -> None:
    """It is what the note derives from exact accumulators, and less than the bound of one stretch for independent tokens.

    Seen to fail when the accumulators are left out, or those of one stretch in two.
    """
    a, g = factors(2, 32 * 7 + 5, 16, 24, torch.bfloat16)
    if adverse:
        a, g = cancelling(a, g)
    lengths = (x.double().norm(dim=2) for x in (a, g))
    S = torch.stack(list(lengths)).prod(0).sum(1)
    starts = [g[:, :t].double().mT @ a[:, :t].double() for t in range(32, a.shape[1], 32)]
    run = torch.stack([x.norm(dim=(1, 2)) for x in starts]).sum(0)  # of one tile
    off = gamma(33, ROUNDOFF) * (run + S)
    terms = terms_of(kernels, (a, g))
    needed = (exact(a, g).sqrt() + off).square()
    assert (terms.norm_sq + terms.error >= 0.9999999 * needed).all()
    torch.testing.assert_close(terms.norm_sq + terms.error, needed, rtol=1e-4, atol=0)
    if not adverse:
        assert (terms.error < 0.5 * _instantiated_norms(a, g).error).all()


def test_the_error_of_a_worst_case_of_truncation_is_covered(kernels: ModuleType) -> None:
    """All products positive, sums truncated after every addition, which the bound's model allows: a chain of float32."""
    a = torch.full((1, 3000, 8), 1.0 + 2.0**-7, dtype=torch.bfloat16)
    g = (1 + torch.rand(1, 3000, 8, generator=torch.Generator().manual_seed(0))).bfloat16()
    total = torch.zeros(8)
    for t in range(3000):
        added = total.double() + g[0, t].double() * a[0, t, 0].double()
        rounded = added.float()
        total = torch.where(rounded.double() > added, rounded.nextafter(torch.zeros(8)), rounded)
    lost = exact(a, g).sqrt() - (8 * total.double().square().sum()).sqrt()
    whole = kernels.norm_terms([(a, g)], 2 * ROUNDOFF)[0]  # truncation has twice the unit roundoff
    assert lost > 0
    assert lost < (whole[0] + whole[1]).sqrt() - whole[0].sqrt()


def test_layers_together_have_the_terms_that_each_has_alone(kernels: ModuleType) -> None:
    """Of several widths and lengths, two of them with one input. Seen to fail with a layer's first sum off by one."""
    pairs = [factors(3, T, D, P, torch.bfloat16) for T, D, P in [(21, 24, 40), (70, 136, 8), (5, 16, 72)]]
    pairs.append((pairs[0][0], pairs[0][1] * 2))
    alone = torch.cat([kernels.norm_terms([pair], ROUNDOFF) for pair in pairs])
    torch.testing.assert_close(kernels.norm_terms(pairs, ROUNDOFF), alone, rtol=1e-12, atol=0)


def test_factors_that_are_views(kernels: ModuleType) -> None:
    """Seen to fail when lengths of tokens are read as if a row had no gap."""
    whole = torch.randn(2, 21, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    a, g = whole[:, :, 8:32], whole[:, :, 32:48]
    found = kernels.norm_terms([(a, g)], ROUNDOFF)
    assert torch.equal(found, kernels.norm_terms([(a.contiguous(), g.contiguous())], ROUNDOFF))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_row_that_cannot_be_measured_is_not_finite(kernels: ModuleType) -> None:
    """NaN, infinity beside zeros, a token too long."""
    a, g = factors(4, 3, 8, 8, torch.bfloat16)
    a[0, 1, 2] = torch.nan
    a[1, 1, 2], g[1] = torch.inf, 0.0
    g[2, 0, 0] = 1e30
    assert torch.isfinite(certified_norm(terms_of(kernels, (a, g)))).tolist() == [False, False, False, True]


# ------------------------------------------------------------------------------------------------------------- stored


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_stored_is_what_was_measured(
    shape: tuple[int, int, int, int], dtype: torch.dtype, kept: torch.dtype, kernels: ModuleType
) -> None:
    """Seen to fail when squares are taken before rounding."""
    a, g = factors(*shape, dtype)
    stored, squares = kernels.store(a, g, kept)
    terms = NormTerms.unstack(kernels.terms_of_stored([(stored, squares)])[0])
    eps = torch.finfo(kept).eps
    torch.testing.assert_close(stored.double(), g.double().mT @ a.double(), rtol=eps, atol=1e-5)
    norm_sq = stored.double().square().sum((1, 2))
    assert stored.dtype == kept and stored.shape == (shape[0], shape[3], shape[2])
    assert ((terms.norm_sq - norm_sq).abs() <= terms.error).all()
    assert (terms.error <= 1e-4 * norm_sq + 1e-20).all()
    assert (certified_norm(terms) >= norm_sq.sqrt() * (1 + 2.0**-23)).all()


def test_more_stored_layers_than_one_launch_measures(kernels: ModuleType) -> None:
    """Seen to fail when a launch's layers are written where those of the first one are."""
    formed = [
        kernels.store(*factors(3, 21, 24, 8 * (number + 1), torch.bfloat16), torch.bfloat16) for number in range(10)
    ]
    found = kernels.terms_of_stored(formed)
    for terms, one in zip(found, formed, strict=True):
        torch.testing.assert_close(terms[0], one[0].double().square().sum((1, 2)), rtol=1e-5, atol=0)
        assert torch.equal(terms, kernels.terms_of_stored([one])[0])


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 40, 24), (1, 8, 200), (5, 1, 8)])
def test_weighted_rows(shape: tuple[int, int, int], kept: torch.dtype, kernels: ModuleType) -> None:
    """A row of weight zero is not read, whatever it holds. Seen to fail when it is multiplied by zero."""
    generator = torch.Generator().manual_seed(0)
    stored, weight = torch.randn(shape, generator=generator).to(kept), torch.rand(shape[0], generator=generator) + 0.1
    if shape[0] > 1:
        weight[1], stored[1] = 0.0, torch.nan
    of_kept = weight != 0
    out = torch.full(shape[1:], torch.nan)
    kernels.weighted_rows(stored, weight, out)
    expected = torch.einsum("b,bpd->pd", weight[of_kept].double(), stored[of_kept].double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_weighted_rows_of_a_wide_head(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many outputs as a large vocabulary has words. Seen to fail: a GPU refuses a second dimension so long."""
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, *_, **__: grids.append(grid))
    kernels.weighted_rows(torch.zeros(1, 128_256, 4), torch.ones(1), torch.empty(128_256, 4))
    assert max(grids[0][1:]) <= 65535


def test_weighted_rows_in_slices_of_a_bucket(kernels: ModuleType) -> None:
    stored, weight = torch.randn(2, 40, 24), torch.tensor([0.5, 2.0])
    bucket = torch.full((4, 7 + 10 * 24), torch.nan)
    slices = bucket[:, 7:].unflatten(1, (10, 24))
    out = torch.empty(40, 24)
    kernels.weighted_rows(stored, weight, slices)
    kernels.weighted_rows(stored, weight, out)
    assert torch.equal(slices.flatten(0, 1), out) and bucket[:, :7].isnan().all()


def test_weighted_rows_onto_what_stands_in_one_slice(kernels: ModuleType) -> None:
    """Seen to fail when it is added to all slices, or read from the row that it has in the whole."""
    stored, weight, standing = torch.randn(2, 40, 24), torch.tensor([0.5, 2.0]), torch.randn(10, 24)
    slices, out = torch.empty(4, 10, 24), torch.empty(4, 10, 24)
    kernels.weighted_rows(stored, weight, out)
    kernels.weighted_rows(stored, weight, slices, standing, 2)
    out[2] += standing
    assert torch.equal(slices, out)


# ---------------------------------------------------------------------------------------------- as gradients uses them


def test_the_ways_of_a_gpu_are_those_without(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stored, a rounded, a dropped and a Gram layer of one unit: norms and sums as by torch, the stored one's in its place.

    Seen to fail when a stored gradient's sum is not written to its place.
    """
    methods = {24: "store", 48: "round", 40: "instantiate", 16: "gram"}
    pairs = {str(D): factors(3, 21, D, 32, torch.bfloat16) for D in methods}
    exact_sq = sum(exact(a, g) for a, g in pairs.values())
    monkeypatch.setattr(outer, "usable", lambda a, g: True)
    monkeypatch.setattr(planner, "method", lambda T, D, *rest, **options: methods[D])
    outers = {name: settled(OuterProduct(a, g), soon=name == "48") for name, (a, g) in pairs.items()}
    assert [type(x) for x in outers.values()] == [Formed, Formed, OuterProduct, OuterProduct]
    assert [x.method for x in outers.values()] == ["store", "round", "instantiate", "gram"]
    terms = total_norm_terms(list(outers.values()), 3, torch.device("cpu"))
    rounded = outers["48"].dense().double()  # type: ignore[union-attr]
    exact_sq += rounded.square().sum((1, 2)) - exact(*pairs["48"])
    torch.testing.assert_close(terms.norm_sq, exact_sq, rtol=1e-5, atol=0)
    assert (certified_norm(terms) >= exact_sq.sqrt()).all()
    weight, keep = torch.tensor([0.5, 0.0, 2.0]), torch.tensor([True, False, True])
    places = {"24": torch.full((2, 16, 24), torch.nan)}
    sums = weighted_sums(outers, weight, keep, places)
    assert sums["24"] is places["24"]
    for name, (a, g) in pairs.items():
        expected = torch.einsum("b,btp,btd->pd", weight.double(), g.double(), a.double())
        if name == "48":
            torch.testing.assert_close(rounded, g.double().mT @ a.double(), rtol=2.0**-7, atol=1e-5)
            expected = torch.einsum("b,bpd->pd", weight.double(), rounded)
        torch.testing.assert_close(sums[name].double().view(expected.shape), expected, rtol=1e-5, atol=1e-5)
        alone = outers[name].weighted_sum(weight, keep)
        torch.testing.assert_close(alone.double(), expected, rtol=1e-5, atol=1e-5)


def test_one_row_more_or_less_does_not_decide_whether_rows_are_rounded(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would change all others by 0.17 %, and their weights by what Gram matrices leave open. Seen to fail where rows that
    have no tile for every multiprocessor were not rounded."""
    monkeypatch.setattr(outer, "usable", lambda a, g: True)
    monkeypatch.setattr(outer, "forms_well", lambda a, g: a.shape[0] > 2)
    monkeypatch.setattr(planner, "method", lambda *_, rounds=False, **__: "round" if rounds else "gram")
    a, g = factors(3, 21, 24, 32, torch.bfloat16)
    three, two = (OuterProduct(a[:rows], g[:rows]).rounded() for rows in (3, 2))
    assert three.method == two.method == "round" and torch.equal(three.dense()[:2], two.dense())


def test_padded_outputs_are_not_rounded(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's vocabulary, in a head that is a unit of its own. Seen to fail: the sum was as wide as the padded copy, beyond
    the parameter's place."""
    monkeypatch.setattr(outer, "_runs_on", lambda device: True)
    assert planner.method(1024, 768, 50257, 2, 4, fused=True, rounds=True) == "round"
    monkeypatch.setattr(planner, "method", lambda *_, rounds=False, **__: "round" if rounds else "gram")
    a, g = factors(2, 3, 8, 1028, torch.bfloat16)
    assert OuterProduct(a, g).is_fused
    kept = settled(OuterProduct(a, g), soon=True)
    assert kept.method == "gram" and kept.dense().shape == (2, 1028, 8)
