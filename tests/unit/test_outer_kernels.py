"""Kernels over (a, g) in Triton's interpreter, against float64: weighted sums, ghost norms with their bounds, norm layers.

tests/gpu/test_outer_kernels.py has the compiled ones. A docstring says "Seen to fail" where the property was broken on
purpose and the test was seen to find it.

Legend: B rows, T positions, D inputs, P outputs.
"""

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from fsdp_dp import planner
from fsdp_dp.clipping import certified_norm
from fsdp_dp.gradients import OuterProduct, _gram_norms
from fsdp_dp.kernels import outer
from fsdp_dp.norm_terms import NormTerms
from tests.unit.interpreted import interpreter

HALVES = (torch.bfloat16, torch.float16)
ROUNDOFF = 2.0**-24  # the interpreter multiplies in float32

# (B, T, D, P): more than a tile and less, no multiple of one, one of everything.
SHAPES = [(3, 21, 24, 40), (2, 16, 72, 16), (1, 1, 8, 8)]


@pytest.fixture(scope="module")
def ghost_norm() -> Iterator[ModuleType]:
    with interpreter():
        from fsdp_dp.kernels import ghost_norm

        yield ghost_norm


@pytest.fixture(scope="module")
def weighted_outer() -> Iterator[SimpleNamespace]:
    with interpreter():
        from fsdp_dp.kernels import weighted_outer

        def alone(a: Tensor, g: Tensor, weight: Tensor, out: Tensor) -> Tensor:
            weighted_outer.weighted_outers([(a, g, out)], weight)
            return out

        yield SimpleNamespace(weighted_outer=alone, together=weighted_outer.weighted_outers)


def factors(B: int, T: int, D: int, P: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(B + T + D + P)
    a, g = (torch.randn(B, T, C, generator=generator).to(dtype) for C in (D, P))
    return a, g


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


# ------------------------------------------------------------------------------------------------------ weighted sums


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_sum(shape: tuple[int, int, int, int], dtype: torch.dtype, weighted_outer: SimpleNamespace) -> None:
    """Seen to fail when the last weight, or the quotient before a row, is left out."""
    a, g = factors(*shape, dtype)
    weight = torch.rand(shape[0]) + 0.1
    out = torch.full((shape[3], shape[2]), torch.nan)
    weighted_outer.weighted_outer(a, g, weight, out)
    assert off(out, torch.einsum("b,btp,btd->pd", weight.double(), g.double(), a.double())) < 1e-6


def test_a_row_of_weight_zero_is_not_read_whatever_it_holds(weighted_outer: SimpleNamespace) -> None:
    """First, in the middle and last. Seen to fail when the sum is multiplied by the quotient of weights without asking."""
    for row in range(3):
        a, g = factors(3, 5, 16, 8, torch.float16)
        a[row], g[row, 2, 3] = torch.nan, torch.inf
        weight = torch.tensor([0.5, 2.0, 0.25])
        weight[row] = 0.0
        kept = weight > 0
        expected = torch.einsum("b,btp,btd->pd", weight[kept].double(), g[kept].double(), a[kept].double())
        assert off(weighted_outer.weighted_outer(a, g, weight, torch.empty(8, 16)), expected) < 1e-6
    nothing = weighted_outer.weighted_outer(a, g, torch.zeros(3), torch.full((8, 16), torch.nan))
    assert not nothing.any()


def test_weights_of_very_different_size(weighted_outer: SimpleNamespace) -> None:
    """2^120 apart, as `clipping` allows them to be: no quotient overflows, none takes other rows along."""
    a, g = factors(4, 4, 8, 8, torch.float16)
    g = g * torch.tensor([2.0**-3, 2.0**3, 1.0, 2.0**-2])[:, None, None].half()
    weight = torch.tensor([2.0**40, 2.0**-80, 2.0**40, 1.0])
    found = weighted_outer.weighted_outer(a, g, weight, torch.empty(8, 8))
    assert off(found, torch.einsum("b,btp,btd->pd", weight.double(), g.double(), a.double())) < 1e-6
    alone = weighted_outer.weighted_outer(a[1:2], g[1:2], weight[1:2], torch.empty(8, 8))
    assert off(alone, weight[1].double() * (g[1].double().T @ a[1].double())) < 1e-6


def test_each_sum_has_the_weights_of_its_owner(weighted_outer: SimpleNamespace) -> None:
    sums = [(*factors(3, 5, 16, 8, torch.float16), torch.empty(8, 16)) for _ in range(3)]
    weight = torch.tensor([[0.5, 0.0, 2.0], [1.0, 0.25, 0.0]])
    weighted_outer.together(sums, weight, [1, 0, 1])
    for (a, g, out), owner in zip(sums, [1, 0, 1], strict=True):
        assert off(out, torch.einsum("b,btp,btd->pd", weight[owner].double(), g.double(), a.double())) < 1e-6


def test_weighted_sum_in_slices_of_a_bucket(weighted_outer: SimpleNamespace) -> None:
    a, g = factors(2, 5, 24, 40, torch.float16)
    weight = torch.tensor([0.5, 2.0])
    bucket = torch.full((4, 7 + 10 * 24), torch.nan)
    slices = bucket[:, 7:].unflatten(1, (10, 24))
    weighted_outer.weighted_outer(a, g, weight, slices)
    assert torch.equal(slices.flatten(0, 1), weighted_outer.weighted_outer(a, g, weight, torch.empty(40, 24)))
    assert bucket[:, :7].isnan().all()


# --------------------------------------------------------------------------------------------------------- ghost norms


def terms_of(ghost_norm: ModuleType, a: Tensor, gs: list[Tensor]) -> NormTerms:
    norms = ghost_norm.GhostNorms(len(a), a.device, ROUNDOFF)
    norms.add([(a, gs)])
    return NormTerms.unstack(norms.terms().sum(0))


def cancelling(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A key projection: inputs share a large mean, output gradients add up to nearly zero."""
    return (0.01 * a + a[:, :1]).to(a.dtype), (g - g.float().mean(1, keepdim=True)).to(g.dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("adverse", [False, True], ids=["independent", "cancelling"])
def test_ghost_norms_of_layers_that_share_their_input(
    dtype: torch.dtype, adverse: bool, ghost_norm: ModuleType
) -> None:
    """Seen to fail when tiles off the diagonal count once."""
    for B, T, D, widths in [(2, 21, 24, (40, 8)), (1, 16, 40, (24,)), (1, 1, 8, (16, 8, 8))]:
        a, g = factors(B, T, D, sum(widths), dtype)
        gs = [x.contiguous() for x in g.split(widths, 2)]
        if adverse:
            a, gs = cancelling(a, a)[0], [cancelling(x, x)[1] for x in gs]
        exact = sum((x.double().mT @ a.double()).square().sum((1, 2)) for x in gs)
        terms = terms_of(ghost_norm, a, gs)
        assert ((terms.norm_sq - exact).abs() <= terms.error).all() and (terms.norm_sq >= 0).all()
        assert (certified_norm(terms) >= exact.sqrt()).all()
        if not adverse:
            torch.testing.assert_close(terms.norm_sq, exact, rtol=1e-6, atol=0)
            assert (certified_norm(terms) <= 1.001 * exact.sqrt()).all()


def test_ghost_norm_terms_are_about_those_of_the_reference(ghost_norm: ModuleType) -> None:
    """The reference weighs every pair of positions by its own lengths, the kernel bounds these: never less, never much more.

    Seen to fail when the accumulation of the Grams is not charged.
    """
    a, g = factors(2, 33, 48, 40, torch.float16)
    found, reference = terms_of(ghost_norm, a, [g]), _gram_norms(a, g)
    torch.testing.assert_close(found.norm_sq, reference.norm_sq, rtol=1e-6, atol=0)
    assert (found.error >= 0.99 * reference.error).all() and (found.error <= 2 * reference.error).all()
    torch.testing.assert_close(found.rounding_sq.sqrt(), reference.rounding_sq.sqrt(), rtol=0.4, atol=0)


@pytest.mark.parametrize("room", [1, 200, 1 << 18])
def test_layers_that_are_measured_together_have_the_terms_that_each_has_alone(
    room: int, ghost_norm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other widths, lengths and numbers, in room for all of them and for one.

    Seen to fail when a layer starts where the one before it does.
    """
    monkeypatch.setattr(ghost_norm, "_ROOM", room)
    shapes = [(3, 21, 24, (40, 8)), (3, 5, 16, (24,)), (3, 21, 8, (16, 8, 8)), (3, 1, 8, (8,))]
    norms, alone = ghost_norm.GhostNorms(3, torch.device("cpu"), ROUNDOFF), []
    for B, T, D, widths in shapes:
        a, g = factors(B, T, D, sum(widths), torch.bfloat16)
        gs = [x.contiguous() for x in g.split(widths, 2)]
        norms.add([(a, gs)])
        alone += [terms_of(ghost_norm, a, [x]).stack() for x in gs]
    torch.testing.assert_close(norms.terms(), torch.stack(alone), rtol=1e-6, atol=0)
    norms.add([(a, gs)])
    torch.testing.assert_close(norms.terms(), torch.stack(alone[-1:]), rtol=1e-6, atol=0)


def test_inputs_that_are_added_together_are_measured_as_alone(ghost_norm: ModuleType) -> None:
    """More of them than one launch takes, of several lengths and widths, with one layer and with many.

    Seen to fail with the first program, or the first sum, of an input off by one.
    """
    inputs = []
    for T, D, widths in [
        (21, 24, [40, 8, 16]),
        (5, 8, [8]),
        (70, 16, [8] * 9),
        (21, 40, [24]),
        (17, 8, [8]),
        (3, 8, [8]),
    ]:
        a, g = factors(3, T, D, sum(widths), torch.bfloat16)
        inputs.append((a, [x.contiguous() for x in g.split(widths, 2)]))
    norms = ghost_norm.GhostNorms(3, torch.device("cpu"), ROUNDOFF)
    norms.add(inputs)
    alone = sum(terms_of(ghost_norm, a, [g]).stack() for a, gs in inputs for g in gs)
    torch.testing.assert_close(norms.terms().sum(0), alone, rtol=1e-12, atol=0)


def test_layers_stay_with_their_owners(ghost_norm: ModuleType) -> None:
    """Launches put short inputs, wide ones and other formats apart: the order of the terms is another one then.

    Seen to fail when owners are kept in the order in which layers were added.
    """
    inputs, owners, expected = [], [], {}
    for number, (T, D, widths, dtype) in enumerate([
        (70, 8, [8, 16], torch.bfloat16), (5, 8, [8] * 9, torch.float16), (70, 16, [24], torch.bfloat16),
        (5, 8, [16], torch.float16),
    ]):  # fmt: skip
        a, g = factors(2, T, D, sum(widths), dtype)
        gs = [x.contiguous() for x in g.split(widths, 2)]
        inputs.append((a, gs))
        owners.append([10 * number + layer for layer in range(len(gs))])
        expected |= {10 * number + layer: terms_of(ghost_norm, a, [x]).stack() for layer, x in enumerate(gs)}
    norms = ghost_norm.GhostNorms(2, torch.device("cpu"), ROUNDOFF)
    norms.add(inputs, owners)
    found = dict(zip(norms.owners, norms.terms(), strict=True))
    assert found.keys() == expected.keys()
    for owner, terms in expected.items():
        torch.testing.assert_close(found[owner], terms, rtol=1e-12, atol=0)


def test_wide_gram_matrices_are_contracted_in_chunks(ghost_norm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl

    a, g = factors(1, 5, 24, 72, torch.float16)
    whole = terms_of(ghost_norm, a, [g])
    monkeypatch.setattr(ghost_norm, "CHUNK", tl.constexpr(32))
    chunked = terms_of(ghost_norm, a, [g])
    torch.testing.assert_close(chunked.norm_sq, whole.norm_sq, rtol=1e-6, atol=0)
    assert (chunked.error < whole.error).all()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_row_that_cannot_be_measured_is_not_finite(ghost_norm: ModuleType) -> None:
    """NaN, infinity beside zeros, a token too long."""
    a, g = factors(4, 3, 8, 8, torch.bfloat16)
    a[0, 1, 2] = torch.nan
    a[1, 1, 2], g[1] = torch.inf, 0.0
    g[2, 0, 0] = 1e30
    found = certified_norm(terms_of(ghost_norm, a, [g]))
    assert torch.isfinite(found).tolist() == [False, False, False, True]


def test_tiles_of_pairs(ghost_norm: ModuleType) -> None:
    """Every tile of the lower triangle once: a norm of many tiles is right only then."""
    a, g = factors(1, 130, 8, 8, torch.float16)
    exact = (g.double().mT @ a.double()).square().sum((1, 2))
    torch.testing.assert_close(terms_of(ghost_norm, a, [g]).norm_sq, exact, rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------------------------------- norm layers


# ------------------------------------------------------------------------------------------------------------ planner


def test_the_kernels_are_for_gpus() -> None:
    assert not outer.usable(*factors(2, 4, 8, 8, torch.bfloat16))


def test_the_plan_of_a_gpu() -> None:
    """Short rows of wide layers by Gram matrices; long rows of narrow layers keep their gradient, if it is small."""
    plan = {shape: planner.method(*shape, 2, 4, fused=True) for shape in [
        (100, 1280, 5120), (1024, 2048, 2048), (1024, 2048, 5504), (1024, 768, 768), (8192, 2048, 2048), (8192, 256, 256),
    ]}  # fmt: skip
    assert list(plan.values()) == ["gram", "gram", "gram", "store", "store", "store"]
    assert planner.method(4096, 4096, 4096, 2, 4, fused=True) in ("instantiate", "store")


def test_the_plan_where_gradients_may_be_rounded() -> None:
    """Not where the rounded gradient is much larger than its factors, nor for short rows; a long row's is smaller still."""
    plan = {shape: planner.method(*shape, 2, 4, fused=True, rounds=True) for shape in [
        (100, 1280, 5120), (1024, 4096, 4096), (1024, 2048, 2048), (1024, 2048, 5504), (8192, 2048, 2048),
    ]}  # fmt: skip
    assert list(plan.values()) == ["gram", "gram", "round", "round", "round"]


def test_the_plan_without_kernels() -> None:
    assert planner.method(64, 512, 512, 4, 4, fused=False) == "gram"
    assert planner.method(1024, 512, 512, 4, 4, fused=False) == "store"
    assert planner.method(1030, 2048, 2048, 2, 4, fused=False) == "instantiate"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_stands_in_accumulators_is_added_to_a_slice(dtype: torch.dtype, weighted_outer: SimpleNamespace) -> None:
    a, g = factors(3, 5, 16, 24, dtype)
    weight, places, onto = torch.tensor([0.5, 0.0, 2.0]), torch.full((3, 8 * 16 + 8), torch.nan), torch.randn(8, 16)
    out = places[:, 8:].unflatten(1, (8, 16))
    weighted_outer.together([(a, g, out)], weight, None, [onto], 1)
    expected = torch.einsum("b,btp,btd->pd", weight.double(), g.double(), a.double()).view(3, 8, 16)
    expected[1] += onto
    assert off(out, expected) < 1e-6 and places[:, :8].isnan().all()


# ------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_outputs_of_any_width_are_padded(
    dtype: torch.dtype, weighted_outer: SimpleNamespace, ghost_norm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a vocabulary of 50 257. Seen to fail when the sum is written as wide as the padded factor is."""
    monkeypatch.setattr(outer, "_runs_on", lambda device: True)
    monkeypatch.setattr(outer, "_WORTH_PADDING", 40)
    a, g = factors(3, 5, 48, 45, dtype)
    gradient = OuterProduct(a, g)
    assert gradient.in_fused_gram
    exact = torch.einsum("btp,btd->bpd", g.double(), a.double())
    terms = gradient.norm_terms()
    norm_sq = exact.square().sum((1, 2))
    assert ((terms.norm_sq - norm_sq).abs() <= terms.error).all() and (terms.error <= 0.05 * norm_sq).all()
    weight = torch.tensor([0.5, 0.0, 2.0])
    found = gradient.weighted_sum(weight, weight > 0)
    assert found.shape == (45, 48)
    assert off(found, torch.einsum("b,bpd->pd", weight.double(), exact)) < 1e-6
    memory = torch.full((46, 48), torch.nan)
    outer.weighted_outers([(a, g, memory[:45])], weight)
    assert torch.equal(memory[:45], found) and memory[45].isnan().all()


def test_what_is_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow outputs, whose copies are no bargain; inputs; and gradients that are formed, which have no room for zeros."""
    monkeypatch.setattr(outer, "_runs_on", lambda device: True)
    assert OuterProduct(*factors(2, 8, 1024, 1027, torch.bfloat16)).is_fused
    assert not OuterProduct(*factors(2, 8, 1024, 1021, torch.bfloat16)).is_fused
    assert not OuterProduct(*factors(2, 8, 1027, 1024, torch.bfloat16)).is_fused
    assert not OuterProduct(*factors(1, 4096, 512, 1027, torch.bfloat16)).is_fused
