"""`instantiate` scheduled by hand for Hopper: one warp loads, two warpgroups multiply, as in `hopper`.

The arithmetic is that of `instantiate._form_tiles`, which is the reference and takes over wherever this language (Gluon,
experimental) has not been tried. While a tile is squared, or stored, the stages of what follows are filled.
"""

# Triton's jit reads no annotations but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

_GROUP = gl.constexpr(8)
_FIELDS = gl.constexpr(2)


@gluon.jit(do_not_specialize=["T", "P", "tiles"])
def form_tiles(
    g, a, sums, stored, T, P, D, tiles,
    STRETCH: gl.constexpr, STORE: gl.constexpr, DTYPE: gl.constexpr, DEPTH: gl.constexpr, ROWS: gl.constexpr,
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
    sizes = (T, P, D, tiles)
    gl.warp_specialize(
        [(_multiply, (shared, sizes, sums, stored, STRETCH, STORE, WARPS)), (_load, (shared, sizes, g, a))],
        [1],
        [40],
    )


@gluon.jit
def _tile(tile, P, D, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Of a tile: whose gradient it is of, its first row and its first column there."""
    tiles_down, tiles_across = gl.cdiv(P, ROWS), gl.cdiv(D, COLUMNS)
    i, own = tile // (tiles_down * tiles_across), tile % (tiles_down * tiles_across)
    group = own // (_GROUP * tiles_across)
    place = own % (_GROUP * tiles_across)
    height = gl.minimum(tiles_down - group * _GROUP, _GROUP)
    return i, (group * _GROUP + place % height) * ROWS, place // height * COLUMNS


@gluon.jit
def _load(shared, sizes, g, a):
    """The warp that fills the stages, round and round, over all positions, tile after tile."""
    tiles_g, tiles_a, full, empty = shared
    T, P, D, tiles = sizes
    STAGES: gl.constexpr = tiles_g.shape[0]
    DEPTH: gl.constexpr = tiles_g.shape[1]
    BYTES: gl.constexpr = 2 * DEPTH * (tiles_g.shape[2] + tiles_a.shape[2])
    filled = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i, p, d = _tile(tile, P, D, tiles_g.shape[2], tiles_a.shape[2])
        for t in range(0, T, DEPTH):
            stage = filled % STAGES
            mbarrier.wait(empty.index(stage), (filled // STAGES + 1) & 1)
            mbarrier.expect(full.index(stage), BYTES)
            tma.async_copy_global_to_shared(g, [i, t, p], full.index(stage), tiles_g.index(stage))
            tma.async_copy_global_to_shared(a, [i, t, d], full.index(stage), tiles_a.index(stage))
            filled += 1


@gluon.jit
def _multiply(shared, sizes, sums, stored, STRETCH: gl.constexpr, STORE: gl.constexpr, WARPS: gl.constexpr):
    """The warps that multiply: one product in flight while the next stage is awaited, none where a stretch ends."""
    tiles_g, tiles_a, full, empty = shared
    T, P, D, tiles = sizes
    STAGES: gl.constexpr = tiles_g.shape[0]
    DEPTH: gl.constexpr = tiles_g.shape[1]
    ROWS: gl.constexpr = tiles_g.shape[2]
    COLUMNS: gl.constexpr = tiles_a.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, COLUMNS, 16]
    )
    used = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i, p, d = _tile(tile, P, D, ROWS, COLUMNS)
        total = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
        squares, run = 0.0, 0.0
        for first in range(0, T, STRETCH):
            run += gl.sqrt(squares)
            for t in range(first, gl.minimum(first + STRETCH, T), DEPTH):
                stage = used % STAGES
                mbarrier.wait(full.index(stage), (used // STAGES) & 1)
                g_PT = tiles_g.index(stage).permute((1, 0))
                total = warpgroup_mma(g_PT, tiles_a.index(stage), total, is_async=True)
                total = warpgroup_mma_wait(1, deps=(total,))
                mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), count=1, pred=t > first)
                used += 1
            total = warpgroup_mma_wait(0, deps=(total,))
            mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), count=1)
            if not STORE:
                squares = _squares(total)
        if STORE:
            rounded = total.to(stored.dtype.element_ty)
            squares = _squares(rounded.to(gl.float32))
            row = p + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            column = d + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
            place = gl.to_tensor(i).to(gl.int64) * P * D + row.to(gl.int64) * D
            inside = (row < P)[:, None] & (column < D)[None, :]
            gl.store(stored + place[:, None] + column[None, :], rounded, mask=inside)
        gl.store(sums + tile * _FIELDS, squares)
        gl.store(sums + tile * _FIELDS + 1, run)


@gluon.jit
def _squares(x):
    return gl.sum(gl.sum(x * x, 1), 0)
