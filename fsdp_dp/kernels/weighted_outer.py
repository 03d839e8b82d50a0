"""The clipped sum of a Linear's weight, ``sum_i w_i g_i^T a_i``, in one product whose operands nobody scales.

In the step: `gradients.OuterProduct.weighted_sum` comes here for half-precision factors on a GPU; its torch reference is
the rest of that method. A program owns one tile of the sum and goes through the rows, ``T`` positions each. It keeps one
accumulator, in units of the current row's weight: before row i it is multiplied by ``w_j / w_i``, j being the row before,
and by the last weight at the end. Rows of weight zero (masked, not finite) are never read.

Rounding: products of bfloat16 or float16 numbers are exact, a row's own ``T`` positions are added as any product adds
them, and what stands in the accumulator is multiplied at most ``B`` times after, each time by a quotient that was rounded:
``2 B + 2`` roundings in float32 (`gradients._product_rounding` charges them). Quotients neither overflow nor vanish:
`clipping.MAX_WEIGHT` and `clipping.LONGEST_ROW` see to it.

Shape suffixes as in `gradients`.
"""

# Triton's jit reads no annotations but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsdp_dp.kernels.launching import Block, launch
from fsdp_dp.kernels.tiles import Tiles, hand_scheduled, padded_tile

GROUP = tl.constexpr(8)
"""Tiles of consecutive programs share their columns in groups of this many rows of tiles, so that L2 holds them."""


def weighted_outer(a_BTD: Tensor, g_BTP: Tensor, weight_B: Tensor, out: Tensor) -> Tensor:
    """Write ``sum_i w_i g_i^T a_i`` into ``out`` and return it.

    Args:
        a_BTD, g_BTP: of one half-precision dtype, as `outer` hands them over.
        weight_B: float32, non-negative; a row of weight zero does not take part, whatever it holds.
        out: float32 ``[P, D]``, or ``[W, P / W, D]`` with any strides but a last one of 1 (slices of a bucket).
    """
    B, T, D = a_BTD.shape
    P, dtype = g_BTP.shape[2], a_BTD.dtype
    if out.ndim == 3:
        (slice_stride, row_stride, _), rows = out.stride(), out.shape[1]
    else:
        slice_stride, row_stride, rows = 0, out.stride(0), out.shape[0]
    form = _form(P, D, dtype, a_BTD.device, hand_scheduled(a_BTD.device))
    tiles = form.tiles
    launch(
        form.kernel,
        form.grid,
        (
            Block(g_BTP, form.block_of_g, form.layout_of_g),
            Block(a_BTD, form.block_of_a, form.layout_of_a),
            *(weight_B, out, B, T, P, D, rows, slice_stride, row_stride),
            *form.constants,
        ),
        warps=tiles.warps,
        stages=form.stages,
        key=(
            *(B, T, P, D, dtype, rows, slice_stride, row_stride),
            *(weight_B.dtype, weight_B.data_ptr() % 16 == 0, out.dtype, out.data_ptr() % 16 == 0),
        ),
    )
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Form:
    """What a launch takes from the shape of the sum alone."""

    kernel: Any
    grid: tuple[int, int, int]
    tiles: Tiles
    stages: int
    block_of_g: tuple[int, int, int]
    block_of_a: tuple[int, int, int]
    layout_of_g: Any
    layout_of_a: Any
    constants: tuple[Any, ...]


@functools.lru_cache(maxsize=1024)
def _form(P: int, D: int, dtype: torch.dtype, device: torch.device, by_hand: bool) -> _Form:
    tiles = _tiles(P, D, device)
    kernel, constants, layouts, stages = _weighted_outer, (tiles.depth, tiles.rows, tiles.columns), (None, None), 3
    if by_hand:
        from fsdp_dp.kernels import hopper

        kernel, constants, layouts = hopper.form_of_weighted_outer(dtype, tiles)
    else:
        stages = tiles.stages
    return _Form(
        kernel=kernel,
        grid=(triton.cdiv(P, tiles.rows) * triton.cdiv(D, tiles.columns), 1, 1),
        tiles=tiles,
        stages=stages,
        block_of_g=(1, tiles.depth, tiles.rows),
        block_of_a=(1, tiles.depth, tiles.columns),
        layout_of_g=layouts[0],
        layout_of_a=layouts[1],
        constants=constants,
    )


@functools.cache
def _tiles(P: int, D: int, device: torch.device) -> Tiles:
    """Measured on an H100 (docs/performance.md): wide tiles, narrower ones where these would leave the GPU idle."""
    if device.type != "cuda":  # the interpreter: small, and of three different sizes
        return Tiles(rows=32, columns=64, depth=16, warps=4, stages=2)
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 9:
        return Tiles(rows=128, columns=128, depth=64, warps=8, stages=3)
    if 3 * triton.cdiv(P, 128) * triton.cdiv(D, 256) < 2 * properties.multi_processor_count:
        return Tiles(rows=64, columns=256, depth=64, warps=4, stages=5)
    return Tiles(rows=128, columns=256, depth=64, warps=8, stages=4)


@triton.jit(do_not_specialize=["B", "T", "P"])
def _weighted_outer(
    g, a, weight, out, B, T, P, D, rows, slice_stride, row_stride,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    p, d = padded_tile(tl.program_id(0), P, D, ROWS, COLUMNS, GROUP)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    last = tl.full((), 1.0, tl.float32)
    for i in range(B):
        w = tl.load(weight + i)
        if w != 0:
            total = total * (last / w)
            last = w
            for t in range(0, T, DEPTH):
                # Beyond T, P and D the descriptors read zeros.
                g_TP = g.load([i, t, p]).reshape(DEPTH, ROWS)
                a_TD = a.load([i, t, d]).reshape(DEPTH, COLUMNS)
                total = tl.dot(g_TP.trans(1, 0), a_TD, total)
    row = p + tl.arange(0, ROWS)
    column = d + tl.arange(0, COLUMNS)
    place = (row // rows).to(tl.int64) * slice_stride + (row % rows).to(tl.int64) * row_stride
    inside = (row < P)[:, None] & (column < D)[None, :]
    tl.store(out + place[:, None] + column[None, :], total * last, mask=inside)
