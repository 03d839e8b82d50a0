"""The gradient of every row of a Linear, ``G_i = g_i^T a_i``, with its squared norm in the epilogue of the product.

In the step: `gradients.OuterProduct` comes here for half-precision factors on a GPU where `planner` forms gradients;
`gradients._instantiated_norms` and `gradients.Materialized` are the torch references. A program makes one tile of one row's
gradient, over all positions, and leaves sums of its squares. Two uses:

* `norm_terms` drops the tile: no gradient reaches memory, and what rounding may hide is bounded;
* `store` writes it, in float32 or bfloat16, and sums the squares of what it wrote: nothing is hidden (`terms_of_stored`),
  and the weighted sum reads the stored rows (`weighted_rows`).

[Note: the certificate of a dropped gradient]. The accumulator C^ of an entry takes T products in stretches of L = STRETCH
positions. A stretch is a sum of L + 1 terms, the accumulator it starts from among them, so (Higham, section 3.1)

    |G^ - G| <= gamma(L + 1) (sum over later stretches of |C^ where it starts| + sum_t |g_t| |a_t|).

In norm, the last is at most ``S = sum_t |g_t| |a_t|``; the others are measured tile by tile: ``r = sum of |C^|_F`` of the
tile, whose squares add up over tiles. So ``|G| <= |G^| + gamma(L + 1) (sqrt(sum r^2) + S) + mu(T) sqrt(D P)``. With
independent tokens |C^| grows as the root of the positions, and the slack is about gamma(L) S in place of gamma(T) S. One
stretch is the bound of the reference.

Shape suffixes as in `gradients`.
"""

# Triton's jit reads no annotations but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsdp_dp.kernels.launching import Block, launch
from fsdp_dp.kernels.tables import table, tickets
from fsdp_dp.kernels.tiles import Tiles, hand_scheduled, padded_tile
from fsdp_dp.numerics import underflow, unit_roundoff

GROUP = tl.constexpr(8)
"""Tiles of consecutive programs share their columns in groups of this many rows of tiles, so that L2 holds them."""

FIELDS = tl.constexpr(2)
"""What a program leaves: the squares of its tile, and ``r`` of [Note: the certificate of a dropped gradient]."""

MOST_STORED = 8
"""Layers whose stored gradients one launch measures: those of a block."""

_ENTRY = tl.constexpr(10)
_TINY = tl.constexpr(underflow(1, torch.float32))
_U32 = tl.constexpr(unit_roundoff(torch.float32))
_LONGEST = tl.constexpr(2.0**63)


def norm_terms(pairs: Sequence[tuple[Tensor, Tensor]], roundoff: float) -> Tensor:
    """float64 ``[n, 3, B]``, each as `NormTerms.stack`, of every ``(a_BTD, g_BTP)``; no gradient is stored.

    Args:
        pairs: factors of half precision as `outer` hands them over, all of as many rows.
        roundoff: of one accumulation step of a product on this device (`numerics.tensor_core_roundoff`).
    """
    B, device = pairs[0][0].shape[0], pairs[0][0].device
    sizes = [(a.shape[1], a.shape[2], g.shape[2]) for a, g in pairs]
    tiles = _tiles(device)
    counts = [_count(P, D, tiles) for _, D, P in sizes]
    lengths, places = _lengths([x for pair in pairs for x in pair])
    sums = torch.empty(sum(counts) * B * FIELDS.value, dtype=torch.float32, device=device)
    entries, first = [], 0
    for number, ((a, g), (T, D, P), count) in enumerate(zip(pairs, sizes, counts, strict=True)):
        _form(a, g, sums[first:], sums, tiles)
        of_a, of_g = places[2 * number], places[2 * number + 1]
        entries.append((first, count, T, D, P, of_a, of_g, tiles.rows + tiles.columns, stretch(device), 0))
        first += count * B * FIELDS.value
    terms = torch.empty(len(pairs), 3, B, dtype=torch.float64, device=device)
    launch(
        _finish, (B, len(pairs), 1),
        (sums, lengths, terms, table(tuple(entries), device), B, roundoff, 256), warps=1,
    )  # fmt: skip
    return terms


def store(a_BTD: Tensor, g_BTP: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``G [B, P, D]`` rounded to ``dtype``, and ``[B, N, FIELDS]`` sums of squares of what is stored."""
    B, _, D = a_BTD.shape
    P, device, tiles = g_BTP.shape[2], a_BTD.device, _tiles(a_BTD.device)
    parts = _count(P, D, tiles)
    stored = torch.empty(B, P, D, dtype=dtype, device=device)
    if hand_scheduled(device) and a_BTD.dtype == dtype == torch.bfloat16:
        from fsdp_dp.kernels import rounded_hopper

        sums = torch.empty(B, rounded_hopper.HALVES * parts, FIELDS.value, dtype=torch.float32, device=device)
        _form_rounded(a_BTD, g_BTP, sums, stored, tiles)
    else:
        sums = torch.empty(B, parts, FIELDS.value, dtype=torch.float32, device=device)
        _form(a_BTD, g_BTP, sums, stored, tiles)
    return stored, sums


def terms_of_stored(formed: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """float64 ``[n, 3, B]``, each as `NormTerms.stack`, of what `store` gave, as many rows each."""
    B, device = formed[0][0].shape[0], formed[0][0].device
    sides = _tiles(device).rows + _tiles(device).columns  # at least those of what a sum is over
    terms = torch.empty(len(formed), 3, B, dtype=torch.float64, device=device)
    for first in range(0, len(formed), MOST_STORED):
        part = formed[first : first + MOST_STORED]
        sums = [squares for _, squares in part]
        sizes = tuple([(squares.shape[1], stored[0].numel()) for stored, squares in part])
        launch(
            _finish_stored, (B, len(part), 1),
            (*sums, *sums[:1] * (MOST_STORED - len(part)), terms[first:], table(sizes, device), sides, B, 256), warps=1,
        )  # fmt: skip
    return terms


@functools.cache
def fills(B: int, D: int, P: int, device: torch.device) -> bool:
    """Whether the tiles of so many rows are about as many as the device has multiprocessors, or more."""
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return 5 * B * _count(P, D, _tiles(device)) >= 4 * count


def weighted_rows(stored_BPD: Tensor, weight_B: Tensor, out: Tensor, onto: Tensor | None = None, part: int = 0) -> None:
    """Write ``sum_i w_i G_i`` into ``out``, float32 ``[P, D]`` or ``[W, P / W, D]`` with any strides but a last one of 1.

    One pass over stored rows, added in float32, in their order. A row of weight zero is not read. ``onto``: float32
    contiguous ``[P / W, D]``, to be added to the ``part``-th slice of ``out``.
    """
    B, P, D = stored_BPD.shape
    rows, slice_stride, row_stride = (
        (out.shape[1], out.stride(0), out.stride(1)) if out.ndim == 3 else (out.shape[0], 0, out.stride(0))
    )
    block = 1024 if out.device.type == "cuda" else 64
    launch(
        _weigh, (triton.cdiv(D, block) * P, 1, 1),  # in one dimension: a grid's others end at 65535
        (stored_BPD, weight_B, out, out if onto is None else onto, B, P, D, rows, slice_stride, row_stride, part,
         onto is not None, block), warps=4,
    )  # fmt: skip


def _form(a_BTD: Tensor, g_BTP: Tensor, sums: Tensor, stored: Tensor, tiles: Tiles) -> None:
    """Launch the product; ``stored`` is written to if it is ``[B, P, D]``."""
    B, T, D = a_BTD.shape
    P, device, stores = g_BTP.shape[2], a_BTD.device, stored.ndim == 3
    blocks, count = ((1, tiles.depth, tiles.rows), (1, tiles.depth, tiles.columns)), B * _count(P, D, tiles)
    sizes = (tiles.depth, tiles.rows, tiles.columns)
    if not hand_scheduled(device):
        launch(
            _form_tiles, (count, 1, 1),
            (Block(g_BTP, blocks[0]), Block(a_BTD, blocks[1]), sums, stored, T, P, D, stretch(device), stores, *sizes),
            warps=tiles.warps, stages=tiles.stages,
        )  # fmt: skip
        return
    from fsdp_dp.kernels import hopper, instantiate_hopper

    layouts = [hopper.layout_of(block, a_BTD.dtype) for block in blocks]
    launch(
        instantiate_hopper.form_tiles, (_programs(count, T, device), 1, 1),
        (Block(g_BTP, blocks[0], layouts[0]), Block(a_BTD, blocks[1], layouts[1]), sums, stored, T, P, D, count,
         _ENDLESS if stores else stretch(device), stores, hopper.dtype_of(a_BTD.dtype), *sizes, tiles.stages, tiles.warps),
        warps=tiles.warps,
    )  # fmt: skip


def _form_rounded(a_BTD: Tensor, g_BTP: Tensor, sums: Tensor, stored: Tensor, tiles: Tiles) -> None:
    from fsdp_dp.kernels import hopper, rounded_hopper

    B, T, D = a_BTD.shape
    P, dtype, half = g_BTP.shape[2], a_BTD.dtype, tiles.rows // rounded_hopper.HALVES
    count = B * _count(P, D, tiles)
    blocks = ((1, tiles.depth, half), (1, tiles.depth, tiles.columns), (1, half, tiles.columns))
    read_and_written = [
        Block(x, block, hopper.layout_of(block, dtype)) for x, block in zip((g_BTP, a_BTD, stored), blocks, strict=True)
    ]
    sizes = (T, P, D, count, tiles.depth, tiles.rows, tiles.columns, rounded_hopper.STAGES)
    programs = (min(count, _multiprocessors(a_BTD.device)), 1, 1)
    arguments = (*read_and_written, sums, tickets(a_BTD.device), *sizes)
    launch(rounded_hopper.form_rounded_tiles, programs, arguments, warps=4)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_SHORT_TERMS = 8192
_ENDLESS = 1 << 30


def _programs(tiles: int, T: int, device: torch.device) -> int:
    """Each of which makes up to four tiles, if these are short, as in `weighted_outer`."""
    each = min(4, _SHORT_TERMS // T, tiles // (4 * _multiprocessors(device)))
    return -(-tiles // max(1, each))


def _count(P: int, D: int, tiles: Tiles) -> int:
    return int(triton.cdiv(P, tiles.rows) * triton.cdiv(D, tiles.columns))


def stretch(device: torch.device) -> int:
    """Positions between two looks at the accumulator, a multiple of every tile's depth."""
    return STRETCH if device.type == "cuda" else 32


STRETCH = 1024


def _lengths(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """``|x_t|`` float32 of every tensor ``[B, T, C]``, and where in it each begins; what is given twice is read once."""
    places: dict[tuple[object, ...], int] = {}
    distinct: list[tuple[int, Tensor]] = []
    found, room = [], 0
    for x in tensors:
        key = (x.data_ptr(), x.shape, x.stride())
        if key not in places:
            places[key] = room
            distinct.append((room, x))
            room += x.shape[0] * x.shape[1]
        found.append(places[key])
    lengths = torch.empty(room, dtype=torch.float32, device=tensors[0].device)
    at_once, width = (8, 512) if lengths.is_cuda else (4, 16)
    for place, x in distinct:
        B, T, C = x.shape
        launch(
            _length_of_tokens, (triton.cdiv(B * T, at_once), 1, 1),
            (x, lengths, place, B * T, T, C, x.stride(0), x.stride(1), at_once, width), warps=4,
        )  # fmt: skip
    return lengths, found


@functools.cache
def _tiles(device: torch.device) -> Tiles:
    if device.type != "cuda":  # the interpreter: small, and of three different sizes
        return Tiles(rows=32, columns=64, depth=16, warps=4, stages=2)
    if torch.cuda.get_device_capability(device)[0] < 9:
        return Tiles(rows=128, columns=128, depth=64, warps=8, stages=3)
    return Tiles(rows=128, columns=256, depth=64, warps=8, stages=4)


@triton.jit(do_not_specialize=["T", "P"])
def _form_tiles(
    g, a, sums, stored, T, P, D,
    STRETCH: tl.constexpr, STORE: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(P, ROWS) * tl.cdiv(D, COLUMNS)
    i, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    p, d = padded_tile(tile, P, D, ROWS, COLUMNS, GROUP)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if STORE:
        for t in range(0, T, DEPTH):
            # Beyond T, P and D the descriptors read zeros.
            g_TP = g.load([i, t, p]).reshape(DEPTH, ROWS)
            a_TD = a.load([i, t, d]).reshape(DEPTH, COLUMNS)
            total = tl.dot(g_TP.trans(1, 0), a_TD, total)
        rounded = total.to(stored.dtype.element_ty)
        row, column = p + tl.arange(0, ROWS), d + tl.arange(0, COLUMNS)
        inside = (row < P)[:, None] & (column < D)[None, :]
        place = i.to(tl.int64) * P * D + row.to(tl.int64) * D
        tl.store(stored + place[:, None] + column[None, :], rounded, mask=inside)
        tl.store(sums + tl.program_id(0) * FIELDS, _squares(rounded.to(tl.float32)))
    else:
        squares = tl.full((), 0.0, tl.float32)
        run = tl.full((), 0.0, tl.float32)
        for first in range(0, T, STRETCH):
            run += tl.sqrt(squares)
            for t in range(first, min(first + STRETCH, T), DEPTH):
                g_TP = g.load([i, t, p]).reshape(DEPTH, ROWS)
                a_TD = a.load([i, t, d]).reshape(DEPTH, COLUMNS)
                total = tl.dot(g_TP.trans(1, 0), a_TD, total)
            squares = _squares(total)
        tl.store(sums + tl.program_id(0) * FIELDS, squares)
        tl.store(sums + tl.program_id(0) * FIELDS + 1, run)


@triton.jit
def _squares(x):
    """Rows first, then what they left: each entry goes through as many additions as the tile is wide and high."""
    return tl.sum(tl.sum(x * x, 1), 0)


@triton.jit(do_not_specialize=["place", "tokens"])
def _length_of_tokens(x, lengths, place, tokens, T, C, row_stride, stride, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    start = token // T * row_stride + token % T * stride
    total = tl.zeros([TOKENS, WIDTH], tl.float32)
    for first in range(0, C, WIDTH):
        column = first + tl.arange(0, WIDTH)
        inside = (token < tokens)[:, None] & (column < C)[None, :]
        part = tl.load(x + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += part * part
    tl.store(lengths + place + token, tl.sqrt(tl.sum(total, 1)), mask=token < tokens)


@triton.jit(do_not_specialize=["B"])
def _finish(sums, lengths, terms, table, B, U: tl.constexpr, BLOCK: tl.constexpr):
    """[Note: the certificate of a dropped gradient], for one row of one layer."""
    row, number = tl.program_id(0), tl.program_id(1)
    entry = table + number * _ENTRY
    first, tiles, T = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    D, P = tl.load(entry + 3), tl.load(entry + 4)
    of_a, of_g = tl.load(entry + 5), tl.load(entry + 6)
    sides, positions = tl.load(entry + 7), tl.load(entry + 8)
    numel = D.to(tl.float64) * P.to(tl.float64)
    norm_sq, run_sq = _over_tiles(sums + first + row * tiles * FIELDS, tiles, BLOCK)
    summed = _gamma(sides + 4, _U32)  # float32 sums over a tile, of terms that are not negative
    error = 1.01 * norm_sq * summed + numel * _TINY
    # A tile's r: of every stretch a root of such a sum, and the sum of these; squares below the smallest may be lost.
    stretches = (T + positions - 1) // positions
    roots = 1.01 * (summed + _gamma(stretches + 4, _U32))
    run = tl.sqrt(run_sq) * (1 + roots) + stretches * tl.sqrt(numel * _TINY)
    run = tl.where(stretches > 1, run, 0.0)

    S = tl.full((), 0.0, tl.float64)
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        a_norm = _bound(tl.load(lengths + of_a + row * T + t, mask=t < T, other=0.0), D)
        g_norm = _bound(tl.load(lengths + of_g + row * T + t, mask=t < T, other=0.0), P)
        S += tl.sum(tl.where(t < T, a_norm * g_norm, 0.0), 0)
    off = _gamma(min(T, positions) + 1, U) * (run + S) + 4 * T * _TINY * tl.sqrt(numel)
    out = terms + number.to(tl.int64) * 3 * B + row
    tl.store(out, norm_sq)
    tl.store(out + B, 2 * off * tl.sqrt(norm_sq + error) + off * off + error)
    rounding = (1.01 * _gamma(T + 4, U) + 1.01 * _gamma(2 * B + 4, _U32)) * S
    tl.store(out + 2 * B, rounding * rounding)


@triton.jit
def _bound(length, width):
    """Of a token's length as computed in float32: infinite beyond `gradients.LONGEST_TOKEN`; NaN stays NaN."""
    up = length.to(tl.float64) * (1 + _gamma(width + 4, _U32)) + tl.sqrt(width.to(tl.float64) * _TINY)
    return tl.where(up > _LONGEST, float("inf"), up)


@triton.jit(do_not_specialize=["sides", "B"])
def _finish_stored(s0, s1, s2, s3, s4, s5, s6, s7, terms, table, sides, B, BLOCK: tl.constexpr):
    """Of what was stored only the norm has an error; the weighted sum rounds the weight, the product and an addition."""
    row, number = tl.program_id(0), tl.program_id(1)
    sums = s0
    if number == 1:
        sums = s1
    if number == 2:
        sums = s2
    if number == 3:
        sums = s3
    if number == 4:
        sums = s4
    if number == 5:
        sums = s5
    if number == 6:
        sums = s6
    if number == 7:
        sums = s7
    tiles, numel = tl.load(table + 2 * number), tl.load(table + 2 * number + 1)
    norm_sq = _squares_over_tiles(sums + row.to(tl.int64) * tiles * FIELDS, tiles, BLOCK)
    out = terms + number.to(tl.int64) * 3 * B + row
    tl.store(out, norm_sq)
    tl.store(out + B, 1.01 * norm_sq * _gamma(sides + 4, _U32) + numel.to(tl.float64) * _TINY)
    weighting = _gamma(4, _U32)
    tl.store(out + 2 * B, norm_sq * weighting * weighting)


@triton.jit
def _over_tiles(sums, tiles, BLOCK: tl.constexpr):
    """Of the squares, and of the squares of r."""
    squares = tl.zeros([BLOCK], tl.float64)
    run_sq = tl.zeros([BLOCK], tl.float64)
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        squares += tl.load(sums + tile * FIELDS, mask=tile < tiles, other=0.0).to(tl.float64)
        run = tl.load(sums + tile * FIELDS + 1, mask=tile < tiles, other=0.0).to(tl.float64)
        run_sq += run * run
    return tl.sum(squares, 0), tl.sum(run_sq, 0)


@triton.jit
def _squares_over_tiles(sums, tiles, BLOCK: tl.constexpr):
    squares = tl.zeros([BLOCK], tl.float64)
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        squares += tl.load(sums + tile * FIELDS, mask=tile < tiles, other=0.0).to(tl.float64)
    return tl.sum(squares, 0)


@triton.jit
def _gamma(n, u: tl.constexpr):
    """`numerics.gamma`: infinite where it would be useless."""
    spread = n * tl.full((), u, tl.float64)
    return tl.where(spread < 0.5, spread / (1 - spread), float("inf"))


@triton.jit(do_not_specialize=["B", "P", "part"])
def _weigh(
    stored, weight, out, onto, B, P, D, rows, slice_stride, row_stride, part, ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(D, BLOCK)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    inside = column < D
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(B):
        w = tl.load(weight + i)
        if w != 0:
            place = (i * P + row) * D
            total += w * tl.load(stored + place + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        mine = inside & (row // rows == part)
        total += tl.load(onto + row % rows * D + column, mask=mine, other=0.0)
    place = row // rows * slice_stride + row % rows * row_stride
    tl.store(out + place + column, total, mask=inside)
