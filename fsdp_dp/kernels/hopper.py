"""`weighted_outer` scheduled by hand for Hopper: one warp loads, two warpgroups multiply and never wait for a row's start.

Triton drains its pipeline between two rows, since the accumulator is multiplied there: 0.78 to 0.87 of cuBLAS, this 0.89
to 0.95 (docs/performance.md). The arithmetic is that of `weighted_outer`, which is the reference and takes over wherever
this language (Gluon, experimental) has not been tried.
"""

# Triton's jit reads no annotations but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import functools
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from fsdp_dp.kernels.tiles import Tiles

_GROUP = gl.constexpr(8)
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def form_of_weighted_outer(dtype: torch.dtype, tiles: Tiles) -> tuple[Any, tuple[Any, ...], tuple[Any, Any]]:
    """The kernel, its constants, and the layouts of its blocks of ``g`` and ``a``."""
    constants = (_DTYPES[dtype], tiles.depth, tiles.rows, tiles.columns, tiles.stages, tiles.warps)
    return (
        _weighted_outer,
        constants,
        (_layout(tiles.depth, tiles.rows, dtype), _layout(tiles.depth, tiles.columns, dtype)),
    )


@functools.cache
def _layout(depth: int, width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, depth, width], _DTYPES[dtype])


@gluon.jit(do_not_specialize=["B", "T", "P"])
def _weighted_outer(
    g, a, weight, out, B, T, P, D, rows, slice_stride, row_stride,
    DTYPE: gl.constexpr, DEPTH: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    tiles_across = gl.cdiv(D, COLUMNS)
    group = gl.program_id(0) // (_GROUP * tiles_across)
    place = gl.program_id(0) % (_GROUP * tiles_across)
    height = gl.minimum(gl.cdiv(P, ROWS) - group * _GROUP, _GROUP)
    p = (group * _GROUP + place % height) * ROWS
    d = place // height * COLUMNS
    layout_g: gl.constexpr = gl.NVMMASharedLayout.get_default_for([DEPTH, ROWS], DTYPE)
    layout_a: gl.constexpr = gl.NVMMASharedLayout.get_default_for([DEPTH, COLUMNS], DTYPE)
    tiles_g = gl.allocate_shared_memory(DTYPE, [STAGES, DEPTH, ROWS], layout_g)
    tiles_a = gl.allocate_shared_memory(DTYPE, [STAGES, DEPTH, COLUMNS], layout_a)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    shared = (tiles_g, tiles_a, full, empty)
    gl.warp_specialize(
        [
            (_multiply, (shared, weight, out, B, T, P, D, rows, slice_stride, row_stride, p, d, WARPS)),
            (_load, (shared, g, a, weight, B, T, p, d)),
        ],
        [1],
        [24],
    )


@gluon.jit
def _load(shared, g, a, weight, B, T, p, d):
    """The warp that fills the stages, round and round, over all positions of all rows that take part."""
    tiles_g, tiles_a, full, empty = shared
    STAGES: gl.constexpr = tiles_g.shape[0]
    DEPTH: gl.constexpr = tiles_g.shape[1]
    BYTES: gl.constexpr = 2 * DEPTH * (tiles_g.shape[2] + tiles_a.shape[2])
    number = 0
    for i in range(B):
        if gl.load(weight + i) != 0:
            for t in range(0, T, DEPTH):
                stage = number % STAGES
                mbarrier.wait(empty.index(stage), (number // STAGES + 1) & 1)
                mbarrier.expect(full.index(stage), BYTES)
                tma.async_copy_global_to_shared(g, [i, t, p], full.index(stage), tiles_g.index(stage))
                tma.async_copy_global_to_shared(a, [i, t, d], full.index(stage), tiles_a.index(stage))
                number += 1


@gluon.jit
def _multiply(shared, weight, out, B, T, P, D, rows, slice_stride, row_stride, p, d, WARPS: gl.constexpr):
    """The warps that multiply: one product in flight while the next stage is awaited, none when a row starts."""
    tiles_g, tiles_a, full, empty = shared
    STAGES: gl.constexpr = tiles_g.shape[0]
    DEPTH: gl.constexpr = tiles_g.shape[1]
    ROWS: gl.constexpr = tiles_g.shape[2]
    COLUMNS: gl.constexpr = tiles_a.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, COLUMNS, 16]
    )
    total = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
    last = 1.0
    number = 0
    for i in range(B):
        w = gl.load(weight + i)
        if w != 0:
            total = total * (last / w)
            last = w
            for t in range(0, T, DEPTH):
                stage = number % STAGES
                mbarrier.wait(full.index(stage), (number // STAGES) & 1)
                g_PT = tiles_g.index(stage).permute((1, 0))
                total = warpgroup_mma(g_PT, tiles_a.index(stage), total, is_async=True)
                total = warpgroup_mma_wait(1, deps=(total,))
                mbarrier.arrive(empty.index((number + STAGES - 1) % STAGES), count=1, pred=t > 0)
                number += 1
            total = warpgroup_mma_wait(0, deps=(total,))
            mbarrier.arrive(empty.index((number + STAGES - 1) % STAGES), count=1)
    row = p + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = d + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    place = (row // rows).to(gl.int64) * slice_stride + (row % rows).to(gl.int64) * row_stride
    inside = (row < P)[:, None] & (column < D)[None, :]
    gl.store(out + place[:, None] + column[None, :], total * last, mask=inside)
