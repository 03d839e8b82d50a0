"""An embedding's per-sample gradients: those of equal indices of a row added up, and the weighted sum of all rows.

A row's positions are sorted by index. A program has some columns of one place in that order: if it is the first of its
index it adds up those that follow, and its slot is the number of different indices before it; if not, it clears one of the
slots that are left over.
"""

# Triton's jit reads no annotations but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsdp_dp.kernels.launching import launch


def compress(index_BT: Tensor, g_BTP: Tensor) -> tuple[Tensor, Tensor]:
    """See `table_rows`."""
    B, T, P = g_BTP.shape
    g_BTP = g_BTP if g_BTP.stride(2) == 1 else g_BTP.contiguous()
    sorted_BT, order_BT = index_BT.contiguous().sort(dim=1, stable=True)  # which lie as what is sorted does
    first_BT = torch.ones_like(sorted_BT, dtype=torch.bool)
    torch.ne(sorted_BT[:, 1:], sorted_BT[:, :-1], out=first_BT[:, 1:])
    used_BT = first_BT.cumsum(1)
    end_BT = torch.searchsorted(sorted_BT, sorted_BT, right=True)
    index = torch.empty(B, T, dtype=torch.int64, device=g_BTP.device)
    value = torch.empty(B, T, P, dtype=torch.float32, device=g_BTP.device)
    columns = _columns(P, g_BTP.device)
    launch(
        _compress, (B * T, triton.cdiv(P, columns), 1),
        (g_BTP, sorted_BT, order_BT, first_BT, used_BT, end_BT, index, value, T, P, g_BTP.stride(0), g_BTP.stride(1),
         columns), warps=4,
    )  # fmt: skip
    return index, value


def weighted_sum(index_BT: Tensor, value_BTP: Tensor, weight_B: Tensor, out: Tensor) -> None:
    """See `table_rows`."""
    B, T, P = value_BTP.shape
    rows, slice_stride, row_stride = (
        (out.shape[1], out.stride(0), out.stride(1)) if out.ndim == 3 else (out.shape[0], 0, out.stride(0))
    )
    columns = _columns(P, out.device)
    launch(
        _weighted_sum, (B * T, triton.cdiv(P, columns), 1),
        (index_BT, value_BTP, weight_B, out, T, P, index_BT.stride(0), index_BT.stride(1), rows, slice_stride, row_stride,
         columns), warps=4,
    )  # fmt: skip


def _columns(P: int, device: torch.device) -> int:
    return min(1024, triton.next_power_of_2(P)) if device.type == "cuda" else 16


@triton.jit(do_not_specialize=["T"])
def _compress(
    g, sorted_index, order, first, used, end, index, value, T, P, row_stride, stride, COLUMNS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row, at = place // T, place % T
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    number, slots = tl.full((), 0, tl.int64), tl.load(used + place)
    if tl.load(first + place) != 0:
        number, slot = tl.load(sorted_index + place), slots - 1
        for following in range(at, tl.load(end + place)):
            t = tl.load(order + row * T + following)
            total += tl.load(g + row * row_stride + t * stride + column, mask=column < P, other=0.0).to(tl.float32)
    else:
        slot = T - 1 - (at - slots)
    tl.store(value + (row * T + slot) * P + column, total, mask=column < P)
    if tl.program_id(1) == 0:
        tl.store(index + row * T + slot, number)


@triton.jit(do_not_specialize=["T", "rows"])
def _weighted_sum(
    index, value, weight, out, T, P, index_row_stride, index_stride, rows, slice_stride, row_stride, COLUMNS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row, slot = place // T, place % T
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    w = tl.load(weight + row)
    if w != 0:
        own = tl.load(value + place * P + column, mask=column < P, other=0.0)
        number = tl.load(index + row * index_row_stride + slot * index_stride)
        to = number // rows * slice_stride + number % rows * row_stride
        tl.atomic_add(out + to + column, w * own, mask=(column < P) & (own != 0), sem="relaxed")
