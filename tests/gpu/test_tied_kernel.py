"""The compiled kernels for a table that is also the head, against float64: norms, their bounds, and the same bits again.

tests/unit/test_tied_kernel.py runs them in the interpreter; here are the rounding of real tensor cores and long rows.
"""

import pytest
import torch
from torch import Tensor

from fsdp_dp.clipping import certified_norm
from fsdp_dp.gradients import IndexedRows, OuterProduct, TiedSum, combine
from fsdp_dp.kernels import outer, tied
from fsdp_dp.norm_terms import NormTerms
from fsdp_dp.numerics import exact_arithmetic

pytestmark = pytest.mark.gpu(count=1)
DEVICE = torch.device("cuda", 0)
# (B, S, T, D, V): no multiple of a tile, GPT-2's, more parts than one.
SHAPES = [(3, 100, 37, 72, 50), (2, 1024, 1024, 768, 50_257), (1, 2500, 40, 33, 77)]
DTYPES = [torch.bfloat16, torch.float16]


def tie(shape: tuple[int, ...], dtype: torch.dtype, kind: str, seed: int) -> TiedSum:
    B, S, T, D, V = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=DEVICE)

    a, g, h = random(B, S, D).to(dtype), random(B, S, V).to(dtype), random(B, T, D).to(dtype)
    index = torch.randint(V, (B, T), generator=generator, device=DEVICE)
    if kind == "one word":
        index[:] = V - 1
    if kind == "any strides":
        a, g, h = (x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (a, g, h))
        index = index.T.contiguous().T
    rows = IndexedRows.compress(index, h, V)
    if kind == "cancelling":
        X = head_at(a, g, rows.index_BT)
        rows = IndexedRows(rows.index_BT, torch.where(rows.value_BTP != 0, -X, 0).float(), V)
    both = combine([OuterProduct(a, g), rows])
    assert isinstance(both, TiedSum) and both.is_fused
    return both


def head_at(a: Tensor, g: Tensor, index: Tensor) -> Tensor:
    """Rows of the head's gradient in float64 ``[B, T, D]``."""
    return torch.stack([y[:, x].double().T @ z.double() for z, y, x in zip(a, g, index, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["independent", "one word", "any strides", "cancelling"])
def test_norms(dtype: torch.dtype, kind: str) -> None:
    if not outer._runs_on(DEVICE):
        pytest.skip("the kernels are for Hopper")
    for seed, shape in enumerate(SHAPES):
        with exact_arithmetic(DEVICE):
            both = tie(shape, dtype, kind, seed)
            a, g, h, index = both.outer.a_BTD, both.outer.g_BTP, both.rows.value_BTP, both.rows.index_BT
            X_sq = torch.stack([(y.double().T @ x.double()).square().sum() for x, y in zip(a, g, strict=True)])
            Y_sq = h.double().square().sum((1, 2))
            norm_sq = X_sq + Y_sq + 2 * (head_at(a, g, index) * h.double()).sum((1, 2))
            nothing = torch.zeros_like(X_sq)
            own = tied.norm_terms(a, g, h, index, NormTerms(norm_sq=X_sq, error=nothing, rounding_sq=nothing))
            assert ((own.norm_sq - norm_sq).abs() <= own.error + 1e-13 * (X_sq + Y_sq)).all()
            torch.testing.assert_close(own.norm_sq, norm_sq, rtol=1e-4, atol=0)
            for terms in (both.norm_terms(), reference(both)):
                assert ((terms.norm_sq - norm_sq).abs() <= terms.error).all()
                assert (certified_norm(terms) >= norm_sq.sqrt()).all()
            assert torch.equal(both.norm_terms().stack(), both.norm_terms().stack())


def reference(both: TiedSum) -> NormTerms:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TiedSum, "is_fused", False)
        return both.norm_terms()


def test_a_row_of_nan_is_dropped_alone() -> None:
    if not outer._runs_on(DEVICE):
        pytest.skip("the kernels are for Hopper")
    for place in ("a", "g", "h"):
        both = tie(SHAPES[0], torch.bfloat16, "independent", 0)
        {"a": both.outer.a_BTD, "g": both.outer.g_BTP, "h": both.rows.value_BTP}[place][1, 0, 0] = torch.nan
        assert torch.isfinite(certified_norm(both.norm_terms())).tolist() == [True, False, True]
