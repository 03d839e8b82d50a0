"""Per-sample gradients of LayerNorm's and RMSNorm's scale and shift, in one pass over input and output gradient.

In the step: the rules of `layers.normalization` come here on a GPU; their torch lines are the reference. A program goes
through some positions of one row: ``x = (a - mean) / deviation`` in float32, ``sum_t g_t x_t`` and ``sum_t g_t``.
"""

# Triton's jit reads no annotations but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsdp_dp.kernels.launching import launch

_ELEMENTS = 8192
"""Of a program's tile: some positions, as wide as the layer."""

_PROGRAMS = 1024
"""Enough of them to fill a GPU a few times over, however few the rows are."""


def norm_rows(
    a_BTC: Tensor, g_BTC: Tensor, eps: float, *, centered: bool, with_shift: bool
) -> tuple[Tensor, Tensor | None]:
    """``sum_t g_t x_t`` ``[B, C]`` float32, and ``sum_t g_t`` if asked for; ``a`` and ``g`` are contiguous.

    ``centered`` tells LayerNorm from RMSNorm.
    """
    B, T, C = a_BTC.shape
    parts, positions, height, columns = _form(B, T, C)
    scale = torch.empty(B, parts, C, dtype=torch.float32, device=a_BTC.device)
    shift = torch.empty_like(scale) if with_shift else scale
    launch(
        _norm_rows, (B, parts, 1),
        (a_BTC, g_BTC, scale, shift, T, C, positions, eps, centered, with_shift, height, columns),
        warps=8,
    )  # fmt: skip
    scale_BC, *shift_BC = (x.sum(1) if parts > 1 else x[:, 0] for x in ((scale, shift) if with_shift else (scale,)))
    return scale_BC, shift_BC[0] if shift_BC else None


@functools.lru_cache(maxsize=1024)
def _form(B: int, T: int, C: int) -> tuple[int, int, int, int]:
    """In how many parts a row is cut, positions of a part, and a program's tile: positions and columns."""
    columns = triton.next_power_of_2(C)
    height = max(1, _ELEMENTS // columns)
    parts = min(triton.cdiv(T, height), triton.cdiv(_PROGRAMS, B))
    return parts, triton.cdiv(T, parts), height, columns


@triton.jit
def _norm_rows(
    a, g, scale, shift, T, C, positions, eps,
    CENTERED: tl.constexpr, SHIFT: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    first = part * positions
    end = min(first + positions, T)
    scale_HC = tl.zeros([HEIGHT, COLUMNS], tl.float32)
    shift_HC = tl.zeros([HEIGHT, COLUMNS], tl.float32)
    for t in range(first, end, HEIGHT):
        position = t + tl.arange(0, HEIGHT)
        inside = (position < end)[:, None] & (column < C)[None, :]
        place = (row * T + position)[:, None] * C + column[None, :]
        x = tl.load(a + place, mask=inside, other=0.0).to(tl.float32)
        g_HC = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
        if CENTERED:
            x = tl.where(inside, x - (tl.sum(x, 1) / C)[:, None], 0.0)
        # Beyond the end everything is zero, eps may be too: 0 / 0 there must not reach the sum.
        reciprocal = tl.where(position < end, 1.0 / tl.sqrt(tl.sum(x * x, 1) / C + eps), 0.0)
        scale_HC += g_HC * (x * reciprocal[:, None])
        if SHIFT:
            shift_HC += g_HC
    out = (row * tl.num_programs(1) + part) * C + column
    tl.store(scale + out, tl.sum(scale_HC, 0), mask=column < C)
    if SHIFT:
        tl.store(shift + out, tl.sum(shift_HC, 0), mask=column < C)
