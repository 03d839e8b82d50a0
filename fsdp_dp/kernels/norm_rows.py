"""Whether the one-pass kernel for LayerNorm and RMSNorm (`norm_rows_triton`) takes a record, and the way to it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fsdp_dp import kernels
from fsdp_dp.numerics import accumulate_dtype

MOST_COLUMNS = 8192


def usable(a: Tensor, g: Tensor, normalized_shape: Sequence[int]) -> bool:
    """Whether `norm_rows` takes these ``[B, ..., C]``; decided by type and shape alone."""
    return (
        len(normalized_shape) == 1
        and a.shape == g.shape
        and a.ndim > 1
        and a.numel() > 0
        and a.shape[-1] <= MOST_COLUMNS
        and a.dtype == g.dtype
        and accumulate_dtype(a.dtype).itemsize == 4
        and kernels.available(a.device)
    )


def norm_rows(
    a_BTC: Tensor, g_BTC: Tensor, eps: float, *, centered: bool, with_shift: bool
) -> tuple[Tensor, Tensor | None]:
    """``sum_t g_t x_t`` ``[B, C]`` float32 and, if asked for, ``sum_t g_t``, where x is ``a`` normalized."""
    from fsdp_dp.kernels import norm_rows_triton as implementation

    return implementation.norm_rows(
        a_BTC.contiguous(), g_BTC.contiguous(), eps, centered=centered, with_shift=with_shift
    )
