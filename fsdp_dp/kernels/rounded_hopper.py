"""`instantiate.store` in bfloat16, scheduled by hand for Hopper: one warp loads, two warpgroups multiply, each by itself.

A row has few positions, so a tile's end is a good part of it: rounding, squaring, and a store that goes through shared memory
and is not waited for. The two warpgroups take the upper and the lower half of every tile, and neither waits for the other.
A program's start is as long as a third of a tile, so there are no more programs than multiprocessors; each asks for the next
tile when it comes to it, since collectives keep some of them from starting. `instantiate._form_tiles` is the reference.
"""

# Triton's jit reads no annotations but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fsdp_dp.kernels.instantiate_hopper import _squares, _tile

HALVES = 2
"""Of a tile, each of a warpgroup and with a sum of squares of its own."""

STAGES = 3
"""What a tile's halves go through on their way out takes the room of a fourth."""

_FIELDS = gl.constexpr(2)
_ROUND = gl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
"""Two at once, to the nearest; one by one they take a quarter of the rate."""

_TOLD = gl.constexpr(2)
"""Tiles that the loading warp may have told of and that are not begun."""


@gluon.jit(do_not_specialize=["T", "P", "tiles"])
def form_rounded_tiles(
    g, a, stored, sums, tickets, T, P, D, tiles,
    DEPTH: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """``tickets``: an int32 that is zero; the programs draw the numbers of tiles from it."""
    DTYPE: gl.constexpr = gl.bfloat16
    HALF: gl.constexpr = ROWS // 2
    layout_g: gl.constexpr = gl.NVMMASharedLayout.get_default_for([DEPTH, HALF], DTYPE)
    layout_a: gl.constexpr = gl.NVMMASharedLayout.get_default_for([DEPTH, COLUMNS], DTYPE)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, COLUMNS], DTYPE)
    upper = gl.allocate_shared_memory(DTYPE, [STAGES, DEPTH, HALF], layout_g)
    lower = gl.allocate_shared_memory(DTYPE, [STAGES, DEPTH, HALF], layout_g)
    tiles_a = gl.allocate_shared_memory(DTYPE, [STAGES, DEPTH, COLUMNS], layout_a)
    upper_out = gl.allocate_shared_memory(DTYPE, [HALF, COLUMNS], layout)
    lower_out = gl.allocate_shared_memory(DTYPE, [HALF, COLUMNS], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    told = gl.allocate_shared_memory(gl.int64, [_TOLD, 1], mbarrier.MBarrierLayout())
    begun = gl.allocate_shared_memory(gl.int64, [_TOLD, 1], mbarrier.MBarrierLayout())
    numbers = gl.allocate_shared_memory(gl.int32, [_TOLD, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    for place in gl.static_range(_TOLD):
        mbarrier.init(told.index(place), count=1)
        mbarrier.init(begun.index(place), count=2)
    stages = (tiles_a, full, empty)
    queue = (numbers, told, begun)
    sizes = (T, P, D, tiles)
    gl.warp_specialize(
        [
            (_multiply, (upper, stages, queue, sizes, sums, stored, upper_out, 0)),
            (_multiply, (lower, stages, queue, sizes, sums, stored, lower_out, 1)),
            (_load, (upper, lower, stages, queue, sizes, g, a, tickets)),
        ],
        [4, 1],
        [224, 40],
    )


@gluon.jit
def _load(upper, lower, stages, queue, sizes, g, a, tickets):
    """The warp that asks for tiles, tells of them, and fills the stages over all positions of each."""
    tiles_a, full, empty = stages
    numbers, told, begun = queue
    T, P, D, tiles = sizes
    STAGES: gl.constexpr = tiles_a.shape[0]
    DEPTH: gl.constexpr = tiles_a.shape[1]
    HALF: gl.constexpr = upper.shape[2]
    BYTES: gl.constexpr = 2 * DEPTH * (2 * HALF + tiles_a.shape[2])
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    filled, count, tile = 0, 0, 0
    while tile < tiles:
        tile = gl.atomic_add(tickets, 1, sem="relaxed")
        place = count % _TOLD
        mbarrier.wait(begun.index(place), (count // _TOLD + 1) & 1)
        numbers.index(place).store(gl.full([1], tile, gl.int32, one))
        mbarrier.arrive(told.index(place), count=1)
        count += 1
        if tile < tiles:
            i, p, d = _tile(tile, P, D, 2 * HALF, tiles_a.shape[2])
            for t in range(0, T, DEPTH):
                stage = filled % STAGES
                mbarrier.wait(empty.index(stage), (filled // STAGES + 1) & 1)
                mbarrier.expect(full.index(stage), BYTES)
                tma.async_copy_global_to_shared(g, [i, t, p], full.index(stage), upper.index(stage))
                tma.async_copy_global_to_shared(a, [i, t, d], full.index(stage), tiles_a.index(stage))
                tma.async_copy_global_to_shared(g, [i, t, p + HALF], full.index(stage), lower.index(stage))
                filled += 1


@gluon.jit
def _told(queue, count):
    """The number of a tile, or one beyond the last."""
    numbers, told, begun = queue
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    place = count % _TOLD
    mbarrier.wait(told.index(place), (count // _TOLD) & 1)
    number = gl.max(numbers.index(place).load(one), 0)
    mbarrier.arrive(begun.index(place), count=1)
    return number


@gluon.jit
def _multiply(halves_g, stages, queue, sizes, sums, stored, out, NUMBER: gl.constexpr):
    """A warpgroup's half of every tile: one product in flight while the next stage is awaited."""
    tiles_a, full, empty = stages
    T, P, D, tiles = sizes
    STAGES: gl.constexpr = tiles_a.shape[0]
    DEPTH: gl.constexpr = tiles_a.shape[1]
    HALF: gl.constexpr = halves_g.shape[2]
    COLUMNS: gl.constexpr = tiles_a.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )
    used, count = 0, 1
    tile = _told(queue, 0)
    while tile < tiles:
        i, p, d = _tile(tile, P, D, 2 * HALF, COLUMNS)
        total = gl.zeros([HALF, COLUMNS], gl.float32, layout)
        for t in range(0, T, DEPTH):
            stage = used % STAGES
            mbarrier.wait(full.index(stage), (used // STAGES) & 1)
            g_PT = halves_g.index(stage).permute((1, 0))
            total = warpgroup_mma(g_PT, tiles_a.index(stage), total, is_async=True)
            total = warpgroup_mma_wait(1, deps=(total,))
            mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), count=1, pred=t > 0)
            used += 1
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), count=1)
        rounded = gl.inline_asm_elementwise(_ROUND, "=r,f,f", [total], dtype=gl.bfloat16, is_pure=True, pack=2)
        tma.store_wait(0)
        out.store(rounded)
        fence_async_shared()
        tma.async_copy_shared_to_global(stored, [i, p + NUMBER * HALF, d], out)
        gl.store(sums + (2 * tile + NUMBER) * _FIELDS, _squares(rounded.to(gl.float32)))
        tile = _told(queue, count)
        count += 1
    tma.store_wait(0)
