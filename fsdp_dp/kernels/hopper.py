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


MOST = 8
"""Sums of one launch: the Linears of a block."""

FIELDS = gl.constexpr(10)
"""What the table says of each of them: T, P, D, ``rows``, ``slice_stride``, ``row_stride``, its first tile, where the
weights of its rows begin, and between which rows ``onto`` is added."""


def form_of_weighted_outers(dtype: torch.dtype, tiles: Tiles) -> tuple[Any, tuple[Any, ...], tuple[Any, Any]]:
    """The kernel, its constants, and the layouts of its blocks of ``g`` and ``a``."""
    constants = (_DTYPES[dtype], tiles.depth, tiles.rows, tiles.columns, tiles.stages, tiles.warps)
    return (
        _weighted_outers,
        constants,
        (layout_of((1, tiles.depth, tiles.rows), dtype), layout_of((1, tiles.depth, tiles.columns), dtype)),
    )


def dtype_of(dtype: torch.dtype) -> gl.dtype:
    """Gluon's name of a torch format."""
    return _DTYPES[dtype]


@functools.cache
def layout_of(block: tuple[int, int, int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """In shared memory, as tensor cores read it."""
    return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])


@gluon.jit(do_not_specialize=["count", "B", "programs"])
def _weighted_outers(
    g0, g1, g2, g3, g4, g5, g6, g7, a0, a1, a2, a3, a4, a5, a6, a7, out0, out1, out2, out3, out4, out5, out6, out7,
    onto0, onto1, onto2, onto3, onto4, onto5, onto6, onto7, weight, table, count, B, programs,
    ADDS: gl.constexpr, ALIGNED: gl.constexpr, DTYPE: gl.constexpr, DEPTH: gl.constexpr, ROWS: gl.constexpr,
    COLUMNS: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
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
    where = (table, count, B, programs)
    outs = (out0, out1, out2, out3, out4, out5, out6, out7)
    ontos = (onto0, onto1, onto2, onto3, onto4, onto5, onto6, onto7)
    factors = (g0, g1, g2, g3, g4, g5, g6, g7, a0, a1, a2, a3, a4, a5, a6, a7)
    gl.warp_specialize(
        [
            (_multiply, (shared, where, weight, outs, ontos, ADDS, ALIGNED, WARPS)),
            (_load, (shared, where, weight, factors)),
        ],
        [1],
        [40],
    )


@gluon.jit
def _tile(table, count, program, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Of a tile: which sum it is of, that one's entry in the table, and its first row and column."""
    number = 0
    for other in range(1, count):
        number += (program >= gl.load(table + other * FIELDS + 6)).to(gl.int32)
    own = table + number * FIELDS
    P, D = gl.load(own + 1).to(gl.int32), gl.load(own + 2).to(gl.int32)
    program -= gl.load(own + 6).to(gl.int32)
    tiles_across = gl.cdiv(D, COLUMNS)
    group = program // (_GROUP * tiles_across)
    place = program % (_GROUP * tiles_across)
    height = gl.minimum(gl.cdiv(P, ROWS) - group * _GROUP, _GROUP)
    return number, own, (group * _GROUP + place % height) * ROWS, place // height * COLUMNS


@gluon.jit
def _load(shared, where, weight, factors):
    """The warp that fills the stages, round and round, over all positions of all rows that take part, tile after tile."""
    tiles_g, tiles_a, full, empty = shared
    table, count, B, programs = where
    g0, g1, g2, g3, g4, g5, g6, g7, a0, a1, a2, a3, a4, a5, a6, a7 = factors
    STAGES: gl.constexpr = tiles_g.shape[0]
    DEPTH: gl.constexpr = tiles_g.shape[1]
    BYTES: gl.constexpr = 2 * DEPTH * (tiles_g.shape[2] + tiles_a.shape[2])
    filled = 0
    for program in range(gl.program_id(0), programs, gl.num_programs(0)):
        number, own, p, d = _tile(table, count, program, tiles_g.shape[2], tiles_a.shape[2])
        T = gl.load(own).to(gl.int32)
        of_rows = weight + gl.load(own + 7)
        g, a = g0, a0
        if number == 1:
            g, a = g1, a1
        if number == 2:
            g, a = g2, a2
        if number == 3:
            g, a = g3, a3
        if number == 4:
            g, a = g4, a4
        if number == 5:
            g, a = g5, a5
        if number == 6:
            g, a = g6, a6
        if number == 7:
            g, a = g7, a7
        for i in range(B):
            if gl.load(of_rows + i) != 0:
                for t in range(0, T, DEPTH):
                    stage = filled % STAGES
                    mbarrier.wait(empty.index(stage), (filled // STAGES + 1) & 1)
                    mbarrier.expect(full.index(stage), BYTES)
                    tma.async_copy_global_to_shared(g, [i, t, p], full.index(stage), tiles_g.index(stage))
                    tma.async_copy_global_to_shared(a, [i, t, d], full.index(stage), tiles_a.index(stage))
                    filled += 1


@gluon.jit
def _multiply(shared, where, weight, outs, ontos, ADDS: gl.constexpr, ALIGNED: gl.constexpr, WARPS: gl.constexpr):
    """The warps that multiply: one product in flight while the next stage is awaited, none when a row starts.

    While they store a tile, the stages of the next one are filled.
    """
    tiles_g, tiles_a, full, empty = shared
    table, count, B, programs = where
    out0, out1, out2, out3, out4, out5, out6, out7 = outs
    STAGES: gl.constexpr = tiles_g.shape[0]
    DEPTH: gl.constexpr = tiles_g.shape[1]
    ROWS: gl.constexpr = tiles_g.shape[2]
    COLUMNS: gl.constexpr = tiles_a.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, COLUMNS, 16]
    )
    used = 0
    for program in range(gl.program_id(0), programs, gl.num_programs(0)):
        number, own, p, d = _tile(table, count, program, ROWS, COLUMNS)
        T = gl.load(own).to(gl.int32)
        of_rows = weight + gl.load(own + 7)
        total = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
        last = 1.0
        for i in range(B):
            w = gl.load(of_rows + i)
            if w != 0:
                total = total * (last / w)
                last = w
                for t in range(0, T, DEPTH):
                    stage = used % STAGES
                    mbarrier.wait(full.index(stage), (used // STAGES) & 1)
                    g_PT = tiles_g.index(stage).permute((1, 0))
                    total = warpgroup_mma(g_PT, tiles_a.index(stage), total, is_async=True)
                    total = warpgroup_mma_wait(1, deps=(total,))
                    mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), count=1, pred=t > 0)
                    used += 1
                total = warpgroup_mma_wait(0, deps=(total,))
                mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), count=1)
        out = out0
        if number == 1:
            out = out1
        if number == 2:
            out = out2
        if number == 3:
            out = out3
        if number == 4:
            out = out4
        if number == 5:
            out = out5
        if number == 6:
            out = out6
        if number == 7:
            out = out7
        P, D = gl.load(own + 1).to(gl.int32), gl.load(own + 2).to(gl.int32)
        rows, slice_stride, row_stride = gl.load(own + 3).to(gl.int32), gl.load(own + 4), gl.load(own + 5)
        if ALIGNED:
            out, slice_stride = gl.multiple_of(out, 16), gl.multiple_of(slice_stride, 16)
            row_stride, D = gl.multiple_of(row_stride, 16), gl.multiple_of(D, 8)
        row = p + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        column = d + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
        place = (row // rows).to(gl.int64) * slice_stride + (row % rows).to(gl.int64) * row_stride
        inside = (row < P)[:, None] & (column < D)[None, :]
        total = total * last
        if ADDS:
            onto0, onto1, onto2, onto3, onto4, onto5, onto6, onto7 = ontos
            first, end = gl.load(own + 8).to(gl.int32), gl.load(own + 9).to(gl.int32)
            if (p < end) & (p + ROWS > first):
                onto = onto0
                if number == 1:
                    onto = onto1
                if number == 2:
                    onto = onto2
                if number == 3:
                    onto = onto3
                if number == 4:
                    onto = onto4
                if number == 5:
                    onto = onto5
                if number == 6:
                    onto = onto6
                if number == 7:
                    onto = onto7
                if ALIGNED:
                    onto = gl.multiple_of(onto, 16)
                mine = ((row >= first) & (row < end))[:, None] & (column < D)[None, :]
                at = (row - first).to(gl.int64) * D
                total += gl.load(onto + at[:, None] + column[None, :], mask=mine, other=0.0)
        gl.store(out + place[:, None] + column[None, :], total, mask=inside)
