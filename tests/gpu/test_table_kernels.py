"""Compiled kernels for an embedding's per-sample gradients, against float64."""

import pytest
import torch

from fsdp_dp.gradients import IndexedRows
from fsdp_dp.kernels import table_rows

pytestmark = pytest.mark.gpu(count=1)
DEVICE = torch.device("cuda", 0)
V = 512


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(3, 200, 1028), (16, 1024, 2048), (1, 1, 3)])
def test_as_a_dense_table(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    B, T, P = shape
    index = torch.randint(V, (B, T), device=DEVICE)
    index[0] = 5  # a row of one word
    g = torch.randn(B, T, P, device=DEVICE).to(dtype)
    rows = IndexedRows.compress(index, g, V)
    assert rows.is_fused and rows.value_BTP.dtype == torch.float32
    dense = torch.zeros(B, V, P, dtype=torch.float64, device=DEVICE)
    dense.scatter_add_(1, index[..., None].expand(g.shape), g.double())
    terms, norm_sq = rows.norm_terms(), dense.square().sum((1, 2))
    torch.testing.assert_close(terms.norm_sq, norm_sq, rtol=1e-5, atol=0)
    weight = torch.rand(B, device=DEVICE) + 0.1
    if B > 1:
        weight[1], rows.value_BTP[1], dense[1] = 0, torch.nan, 0
    bucket = torch.full((2, V // 2 * P + 64), torch.nan, device=DEVICE)
    slices, standing = bucket[:, 64:].unflatten(1, (V // 2, P)), torch.randn(V // 2, P, device=DEVICE)
    rows.sum_into(weight, slices, standing, 1)
    expected = torch.einsum("b,bvp->vp", weight.double(), dense)
    expected[V // 2 :] += standing
    assert (slices.flatten(0, 1) - expected).norm() <= 1e-6 * expected.norm() and bucket[:, :64].isnan().all()
    assert table_rows.summable(rows.value_BTP)
