"""The kernels for an embedding's per-sample gradients, in Triton's interpreter, against the torch reference and float64.

tests/gpu/test_table_kernels.py has the compiled ones.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fsdp_dp import kernels as packages
from fsdp_dp.gradients import IndexedRows
from fsdp_dp.kernels import table_rows
from tests.unit.interpreted import interpreter

V = 7
# (B, T, P): several columns' programs, fewer than one, one of everything.
SHAPES = [(3, 9, 40), (2, 5, 3), (1, 1, 1)]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with interpreter():
        import fsdp_dp.kernels.table_rows_triton  # noqa: F401

        monkeypatch.setattr(packages, "available", lambda device: True)
        yield


def table(B: int, T: int, P: int, dtype: torch.dtype = torch.float32, below: int = V) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(B + T + P)
    index = torch.randint(below, (B, T), generator=generator)
    return index, torch.randn(B, T, P, generator=generator).to(dtype)


def exact(index: Tensor, g: Tensor) -> Tensor:
    """``[B, V, P]`` float64."""
    dense = torch.zeros(g.shape[0], V, g.shape[2], dtype=torch.float64)
    return dense.scatter_add_(1, index[..., None].expand(g.shape), g.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("below", [V, 2, 1], ids=["some equal", "many equal", "all equal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_indices_are_added_up(shape: tuple[int, int, int], below: int, dtype: torch.dtype) -> None:
    """Slots of different indices come first, in the order of these. Seen to fail when left-over slots keep what was there."""
    index, g = table(*shape, dtype, below)
    found, value = table_rows.compress(index, g)
    for row in range(shape[0]):
        different = index[row].unique()
        assert torch.equal(found[row, : len(different)], different)
        assert not found[row, len(different) :].any() and not value[row, len(different) :].any()
        torch.testing.assert_close(
            value[row, : len(different)].double(), exact(index, g)[row, different], rtol=1e-5, atol=1e-6
        )


def test_gradients_that_backward_expanded() -> None:
    index, g = table(3, 5, 8)
    for expanded in (g[:1].expand(3, 5, 8), g[:, :1].expand(3, 5, 8), g.mT.contiguous().mT):
        _, value = table_rows.compress(index, expanded)
        torch.testing.assert_close(value.sum(1), expanded.sum(1), rtol=1e-5, atol=1e-5)


def test_indices_that_lie_column_by_column() -> None:
    """Sorting leaves them so. Seen to fail: other positions than those of an index were added up, other memory written."""
    index, g = table(3, 5, 8)
    found, value = table_rows.compress(index, g)
    for other in (index.T.contiguous().T, index.repeat(1, 2)[:, :5]):
        again = table_rows.compress(other, g)
        assert torch.equal(again[0], found) and torch.equal(again[1], value)


@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_sum(shape: tuple[int, int, int]) -> None:
    """A row of weight zero is not read, whatever it holds. Seen to fail when it is multiplied by zero."""
    index, g = table(*shape)
    rows = IndexedRows.compress(index, g, V)
    weight = torch.arange(1.0, shape[0] + 1)
    expected = torch.einsum("b,bvp->vp", weight.double(), exact(index, g))
    torch.testing.assert_close(rows.weighted_sum(weight, weight > 0).double(), expected, rtol=1e-5, atol=1e-5)
    if shape[0] > 1:
        rows.value_BTP[1] = torch.nan
        expected -= weight[1].double() * exact(index, g)[1]
        weight[1] = 0
        torch.testing.assert_close(rows.weighted_sum(weight, weight > 0).double(), expected, rtol=1e-5, atol=1e-5)


def test_weighted_sum_in_slices_of_a_bucket_onto_what_stands_there() -> None:
    """Seen to fail when what the bucket held before stays in table rows that no position looked up."""
    index, g = table(3, 2, 8, below=6)
    rows, weight, standing = IndexedRows.compress(index, g, 6), torch.rand(3), torch.randn(3, 8)
    bucket = torch.full((2, 5 + 3 * 8), torch.nan)
    slices = bucket[:, 5:].unflatten(1, (3, 8))
    expected = rows.weighted_sum(weight, weight > 0).unflatten(0, (2, 3))
    assert rows.sum_into(weight, slices) is slices
    torch.testing.assert_close(slices, expected)
    rows.sum_into(weight, slices, standing, 1)
    expected[1] += standing
    torch.testing.assert_close(slices, expected)
    assert bucket[:, :5].isnan().all()


def test_who_asks_for_deterministic_algorithms_gets_sums_in_one_order() -> None:
    _, g = table(3, 2, 8)
    assert table_rows.summable(g)
    torch.use_deterministic_algorithms(True)
    try:
        assert not table_rows.summable(g)
    finally:
        torch.use_deterministic_algorithms(False)


def test_other_formats_stay_with_the_reference() -> None:
    index, g = table(3, 2, 8)
    assert not table_rows.compressible(index, g.double()) and not table_rows.compressible(index[:0], g[:0])
