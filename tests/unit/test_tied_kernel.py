"""The norm of a table that is also the head, from the kernels in Triton's interpreter, against float64.

tests/gpu/test_tied_kernel.py has the compiled ones. Legend: B rows, S positions of the head, T slots, D columns, V words.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fsdp_dp.clipping import certified_norm
from fsdp_dp.gradients import IndexedRows, OuterProduct, TiedSum, combine
from fsdp_dp.kernels import tied
from fsdp_dp.norm_terms import NormTerms
from fsdp_dp.numerics import gamma
from tests.unit.interpreted import interpreter

DTYPES = [torch.bfloat16, torch.float16]
ROUNDOFF = 2.0**-22
"""Of a tensor core that nobody measured, which the interpreter's device is taken for."""

# (B, S, T, D, V): no multiple of a tile, several tiles and parts of each, one of everything, many uses of the head.
SHAPES = [(3, 21, 37, 40, 29), (1, 1, 1, 1, 1), (2, 101, 5, 33, 7), (1, 16, 48, 64, 50_257)]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with interpreter():
        import fsdp_dp.kernels.tied_triton  # noqa: F401

        monkeypatch.setattr(tied.outer, "_runs_on", lambda device: True)
        monkeypatch.setattr("fsdp_dp.gradients.fused.usable_padded", lambda a, g: False)
        yield


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def a_tie(shape: tuple[int, ...], dtype: torch.dtype, index: Tensor | None = None, seed: int = 0) -> TiedSum:
    B, S, T, D, V = shape
    if index is None:
        index = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))
    head = OuterProduct(random(B, S, D, seed=seed).to(dtype), random(B, S, V, seed=seed + 1).to(dtype))
    return tie(head, IndexedRows.compress(index, random(B, T, D, seed=seed + 2).to(dtype), V))


def tie(head: OuterProduct, table: IndexedRows) -> TiedSum:
    both = combine([head, table])
    assert isinstance(both, TiedSum) and both.is_fused
    return both


def parts(both: TiedSum) -> tuple[Tensor, Tensor]:
    """``X`` and ``Y`` ``[B, V, D]`` in float64, row by row and position by position."""
    a, g, h = (x.double() for x in (both.outer.a_BTD, both.outer.g_BTP, both.rows.value_BTP))
    X = torch.stack([g_SV.T @ a_SD for g_SV, a_SD in zip(g, a, strict=True)])
    Y = torch.zeros_like(X)
    for i, row in enumerate(both.rows.index_BT.tolist()):
        for t, word in enumerate(row):
            Y[i, word] += h[i, t]
    return X, Y


def check(both: TiedSum, rtol: float | None = None) -> NormTerms:
    """The error of the kernels' share, beside an exact norm of the head, and that of the whole; twice the same bits."""
    X, Y = parts(both)
    norm_sq, largest = (X + Y).square().sum((1, 2)), X.square().sum((1, 2)) + Y.square().sum((1, 2))
    nothing = torch.zeros_like(norm_sq)
    head = NormTerms(norm_sq=X.square().sum((1, 2)), error=nothing, rounding_sq=nothing)
    factors = both.outer.a_BTD, both.outer.g_BTP, both.rows.value_BTP, both.rows.index_BT
    for terms in (tied.norm_terms(*factors, head), both.norm_terms()):
        assert ((terms.norm_sq - norm_sq).abs() <= terms.error + 1e-13 * largest).all() and (terms.norm_sq >= 0).all()
        if rtol is not None:
            torch.testing.assert_close(terms.norm_sq, norm_sq, rtol=rtol, atol=0)
    assert (certified_norm(terms) >= norm_sq.sqrt()).all()
    assert torch.equal(both.norm_terms().stack(), terms.stack())
    return terms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Also of words that a row has several times. Seen to fail without the cross term, and with that of other words."""
    check(a_tie(shape, dtype), rtol=1e-5)


@pytest.mark.parametrize("word", [0, 28])
def test_one_word_everywhere(word: int) -> None:
    """All slots but one are left over, and programs of these alone make no product."""
    shape = SHAPES[0]
    check(a_tie(shape, torch.bfloat16, torch.full((shape[0], shape[2]), word)), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cancelling(dtype: torch.dtype) -> None:
    """The table takes the head's gradient away up to rounding, or nearly. Seen to fail with negative squares let through."""
    for rest in (0.0, 0.01):
        for seed, (B, S, D, V) in enumerate([(3, 21, 40, 29), (2, 60, 33, 17)]):
            head = a_tie((B, S, V, D, V), dtype, seed=seed).outer
            X = torch.stack([g.T @ a for a, g in zip(head.a_BTD.double(), head.g_BTP.double(), strict=True)])
            index = torch.arange(V).expand(B, V)
            check(tie(head, IndexedRows.compress(index, ((rest - 1) * X).float(), V)))


def test_where_every_addition_loses_the_same() -> None:
    """An eighth of the bound. Seen to fail with a hundredth of the product's."""
    a = torch.full((1, 16, 1), 2.0**-25, dtype=torch.bfloat16)
    a[:, 0] = 1
    one = torch.ones(1, 1, 1)
    check(tie(OuterProduct(a, torch.ones_like(a)), IndexedRows(torch.zeros(1, 1, dtype=torch.long), one, 1)))


SCALES = [(1e-23, 1e17, 1e-3), (1e-18, 1e-18, 1e17), (1e-3, 1e-38, 1e18), (1e-20, 1e-19, 1e-36)]


@pytest.mark.parametrize("scales", SCALES, ids=str)
def test_where_products_underflow(scales: tuple[float, float, float], denormals: None) -> None:
    """Seen to fail without what underflow takes from the product, where denormals are flushed."""
    made = a_tie(SHAPES[0], torch.bfloat16)
    a, g = made.outer.a_BTD * scales[0], made.outer.g_BTP * scales[1]
    rows = IndexedRows(made.rows.index_BT, made.rows.value_BTP * scales[2], made.rows.vocabulary)
    check(tie(OuterProduct(a, g), rows))


@pytest.fixture(params=[False, True], ids=["denormals kept", "denormals flushed"])
def denormals(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param and not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype: torch.dtype) -> None:
    """Of every factor, in the order of no dimension. Seen to fail with strides of contiguous ones."""
    made = a_tie(SHAPES[0], dtype)
    a, g, h, index = made.outer.a_BTD, made.outer.g_BTP, made.rows.value_BTP, made.rows.index_BT
    expected = made.norm_terms().stack()
    turned = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (a, g, h)]
    wide = [torch.stack([x, x + 1], 2)[:, :, 0] for x in (a, g, h)]
    for x, y, z in (turned, wide):
        other = TiedSum(OuterProduct(x, y), IndexedRows(index.T.contiguous().T, z, made.rows.vocabulary))
        assert not x.is_contiguous()
        torch.testing.assert_close(check(other).stack(), expected, rtol=1e-6, atol=0)


def test_several_uses() -> None:
    """Heads and tables one after another: S is not T, and slots of all tables are compressed anew."""
    (B, _, _, D, V), dtype = SHAPES[0], torch.bfloat16
    uses = [a_tie((B, S, T, D, V), dtype, seed=S) for S, T in ((5, 9), (50, 2))]
    both = combine([x for use in uses for x in (use.rows, use.outer)])
    assert isinstance(both, TiedSum) and both.is_fused
    check(both, rtol=1e-5)
    check(both.regroup(1), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("place", ["a", "g", "h"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1.5 * 2.0**63])
def test_a_row_that_cannot_be_measured(place: str, value: float) -> None:
    """It alone is not finite, whatever is known of the head. Seen to fail with either length let through."""
    made = a_tie(SHAPES[0], torch.bfloat16)
    factors = {"a": made.outer.a_BTD, "g": made.outer.g_BTP, "h": made.rows.value_BTP}
    factors[place][1, 0, 0] = value
    assert torch.isfinite(certified_norm(made.norm_terms())).tolist() == [True, False, True]
    if place != "g":
        own = tied.norm_terms(
            factors["a"], factors["g"], factors["h"], made.rows.index_BT, NormTerms.zeros(3, factors["a"].device)
        )
        assert torch.isfinite(certified_norm(own)).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bound_is_that_of_the_arithmetic(dtype: torch.dtype) -> None:
    """Of sums of as many products as a part has positions, weighed by what they multiply, tile by tile: hardly more.

    Seen to fail without the error that the first launch leaves, which slack elsewhere would hide.
    """
    for S in (7, 101):
        both = a_tie((2, S, 20, 30, 25), dtype)
        a, g, h = both.outer.a_BTD.double(), both.outer.g_BTP.double(), both.rows.value_BTP.double()
        at_words = g.gather(2, both.rows.index_BT[:, None].expand(-1, S, -1)).abs()
        weighed = torch.zeros(2, dtype=torch.float64)
        for first in range(0, S, 48):
            part = slice(first, min(first + 48, S))
            spread = torch.einsum("bst,bs,bt->b", at_words[:, part], a[:, part].norm(dim=2), h.norm(dim=2))
            weighed += gamma(part.stop - part.start, ROUNDOFF) * spread
        nothing = NormTerms.zeros(2, a.device)
        factors = both.outer.a_BTD, both.outer.g_BTP, both.rows.value_BTP, both.rows.index_BT
        error = tied.norm_terms(*factors, nothing).error
        assert (error >= 2 * weighed).all() and (error <= 2.01 * weighed).all()


def test_what_the_kernels_do_not_take() -> None:
    a, g, h = random(2, 3, 4).bfloat16(), random(2, 3, 5).bfloat16(), random(2, 6, 4)
    assert tied.usable(a, g, h)
    assert not tied.usable(a.half(), g, h)
    assert not tied.usable(a.float(), g.float(), h)  # no tensor cores
    assert not tied.usable(a, g, h.double())
    assert not tied.usable(a, g[:, :0], h)
