"""`instantiate.store` in bfloat16, scheduled by hand for Hopper: one warp loads, two warpgroups multiply, each by itself.

A row has few positions, so a tile's end is a good part of it: rounding, squaring, and a store that goes through shared memory
and is not waited for. The two warpgroups take the upper and the lower half of every tile, and the first begins a few stages
before the second: while one is at its end, the other has the tensor cores to itself. `instantiate._form_tiles` is the
reference.
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


@gluon.jit(do_not_specialize=["T", "P", "tiles"])
def form_rounded_tiles(
    g, a, stored, sums, T, P, D, tiles,
    DEPTH: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
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
    ahead = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    mbarrier.init(ahead.index(0), count=1)
    sizes = (T, P, D, tiles)
    gl.warp_specialize(
        [
            (_multiply, ((upper, tiles_a, full, empty, ahead), sizes, sums, stored, upper_out, 0)),
            (_multiply, ((lower, tiles_a, full, empty, ahead), sizes, sums, stored, lower_out, 1)),
            (_fill, ((upper, lower, tiles_a, full, empty), sizes, g, a)),
        ],
        [4, 1],
        [224, 40],
    )


@gluon.jit
def _fill(shared, sizes, g, a):
    """The warp that fills the stages, round and round, over all positions, tile after tile."""
    upper, lower, tiles_a, full, empty = shared
    T, P, D, tiles = sizes
    STAGES: gl.constexpr = tiles_a.shape[0]
    DEPTH: gl.constexpr = tiles_a.shape[1]
    HALF: gl.constexpr = upper.shape[2]
    BYTES: gl.constexpr = 2 * DEPTH * (2 * HALF + tiles_a.shape[2])
    filled = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
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
def _multiply(shared, sizes, sums, stored, out, NUMBER: gl.constexpr):
    """A warpgroup's half of every tile: one product in flight while the next stage is awaited."""
    halves_g, tiles_a, full, empty, ahead = shared
    T, P, D, tiles = sizes
    STAGES: gl.constexpr = tiles_a.shape[0]
    DEPTH: gl.constexpr = tiles_a.shape[1]
    HALF: gl.constexpr = halves_g.shape[2]
    COLUMNS: gl.constexpr = tiles_a.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )
    used = 0
    lead = gl.minimum(STAGES, gl.cdiv(T, DEPTH))
    if NUMBER == 1:
        mbarrier.wait(ahead.index(0), 0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
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
            if NUMBER == 0:  # noqa: SIM102 (known to the compiler)
                if used == lead:
                    mbarrier.arrive(ahead.index(0), count=1)
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), count=1)
        rounded = gl.inline_asm_elementwise(_ROUND, "=r,f,f", [total], dtype=gl.bfloat16, is_pure=True, pack=2)
        tma.store_wait(0)
        out.store(rounded)
        fence_async_shared()
        tma.async_copy_shared_to_global(stored, [i, p + NUMBER * HALF, d], out)
        gl.store(sums + (2 * tile + NUMBER) * _FIELDS, _squares(rounded.to(gl.float32)))
    tma.store_wait(0)
