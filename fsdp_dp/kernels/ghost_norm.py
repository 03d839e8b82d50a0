"""Ghost norms of Linears, with the bounds on their rounding: a launch for those of a block, and a last one for all.

In the step: `together.NormTally` comes here for half-precision factors on a GPU; `gradients._gram_norms` is the
torch reference. ``|G|^2 = sum_{t,s} M_ts N_ts`` with ``M = a a^T`` and ``N = g g^T``, both symmetric. A program of the first
launch makes one tile of M (``t >= s``), then the same tile of each layer's N, and leaves sums over the tile's entries; no
Gram matrix reaches memory. The last launch turns the sums of many layers into the three terms of `NormTerms`.

[Note: the certificate]. With computed values M^ = M + E and N^ = N + F, where ``|E_ts| <= gamma(D) |a_t| |a_s| + mu(D)``
and F likewise,

    |sum M^ N^ - sum M N| <= sum |E| |N^| + sum |M^| |F| + sum |E| |F|.

On the diagonal ``|a_t|^2`` is M_tt itself. Off the diagonal Cauchy-Schwarz, over pairs of positions, replaces the token
norms that no program knows by numbers that all of them add up:

    sum_{t != s} |a_t| |a_s| |N^_ts| <= |N^ off the diagonal|_F * sum_t |a_t|^2,

1.25 times the left side for independent tokens of equal length. Sums over a tile are float32, over its rows and then over
its columns: ``gamma(2 tile + 4)`` whatever the order within. Sums over tiles and all that follows are float64.

Shape suffixes as in `gradients`.
"""

# Triton's jit reads no annotations but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsdp_dp.kernels.launching import Launcher, launch
from fsdp_dp.kernels.tables import Table, table
from fsdp_dp.kernels.tiles import Tiles
from fsdp_dp.numerics import underflow, unit_roundoff

MOST_INPUTS, MOST_LAYERS = 4, 8
"""Of one launch: those of a block of a transformer."""

CHUNK = tl.constexpr(4096)
"""Width contracted in one accumulator; wider Gram matrices are sums of several, or their bound would grow with the width."""

# What a program leaves for the input, then for each layer. All but _TRACE, _DIAGONAL, _LENGTHS count a mirrored tile twice.
_TRACE_M, _OFF_M = tl.constexpr(0), tl.constexpr(1)
_INPUT_FIELDS = tl.constexpr(2)
_INNER, _OFF, _DIAGONAL, _LENGTHS, _TRACE = (tl.constexpr(i) for i in range(5))
_LAYER_FIELDS = tl.constexpr(5)

_TABLE_FIELDS = tl.constexpr(6)
"""Of an input: its first program and its first sum (of a row), tiles, D, its first layer and how many it has."""

_TINY = tl.constexpr(underflow(1, torch.float32))
_U32 = tl.constexpr(unit_roundoff(torch.float32))
_LONGEST_SQ = tl.constexpr(2.0**126)


Inputs = Sequence[tuple[Tensor, Sequence[Tensor]]]
"""``(a_BTD, gs)``: an input, and the output gradients ``[B, T, P_l]`` of the layers that were given it."""

_Owned = Sequence[tuple[Tensor, Sequence[Tensor], Sequence[int]]]
"""The same, with whose each layer is."""


class GhostNorms:
    """Collects layers, in one launch for those that are added together, and measures all of them in a last one.

    Args:
        rows: of every layer.
        roundoff: of one accumulation step of a product on this device (`numerics.tensor_core_roundoff`).

    Attributes:
        owners: whose each of the layers is that `terms` tells of next, in its order.
    """

    def __init__(self, rows: int, device: torch.device, roundoff: float) -> None:
        self._rows, self._device, self._roundoff = rows, device, roundoff
        self._room: Tensor | None = None
        self._used = 0
        self._layers: list[tuple[int, ...]] = []
        self._measured: list[Tensor] = []
        self.owners: list[int] = []

    def add(self, inputs: Inputs, owners: Sequence[Sequence[int]] | None = None) -> None:
        """All tensors of a launch have one dtype, and are as `outer` hands them over. ``owners`` of every input's layers."""
        owned = [(a, gs, [0] * len(gs) if owners is None else owners[number]) for number, (a, gs) in enumerate(inputs)]
        for part in _launches(owned, self._rows, self._device):
            self._add([(a, gs) for a, gs, _ in part])
            self.owners += [owner for *_, of_input in part for owner in of_input]

    def _add(self, inputs: Inputs) -> None:
        B, own, layers = self._rows, [a for a, _ in inputs], [g for _, gs in inputs for g in gs]
        form = _form(
            tuple([(a.shape, a.stride(), len(gs)) for a, gs in inputs]),
            tuple([(g.shape[2], g.stride()) for g in layers]),
            own[0].dtype,
            self._device,
        )
        place = self._take(B * form.room)
        launcher = form.launchers[place.bit_length() > 31]
        launcher(
            (B * form.programs, 1, 1),
            (*own, *own[:1] * (MOST_INPUTS - len(own)), *layers, *layers[:1] * (MOST_LAYERS - len(layers))),
            (self._room, place, form.numbers.on(self._device), len(own), B, *form.constants),
        )
        self._layers += [(place + B * before, *rest) for before, *rest in form.layers]

    def terms(self) -> Tensor:
        """float64 ``[n, 3, B]``, each as `NormTerms.stack`; their sum is that of all layers since the last call."""
        self._measure()
        measured, self._measured, self.owners = self._measured, [], []
        return measured[0] if len(measured) == 1 else torch.cat(measured)

    def _take(self, numel: int) -> int:
        """The place of so many sums in ``_room``."""
        if self._room is None or self._used + numel > self._room.numel():
            self._measure()
            self._room = torch.empty(max(numel, _ROOM), dtype=torch.float32, device=self._device)
            self._used = 0
        place, self._used = self._used, self._used + numel
        return place

    def _measure(self) -> None:
        if not self._layers:
            return
        terms = torch.empty(len(self._layers), 3, self._rows, dtype=torch.float64, device=self._device)
        launch(
            _finish, (self._rows, len(self._layers), 1),
            (self._room, terms, table(tuple(self._layers), self._device), self._rows, self._roundoff, 32), warps=1,
        )  # fmt: skip
        self._measured.append(terms)
        self._layers, self._room = [], None


_SHORT = 64
"""Positions for which smaller tiles do."""

_ROOM = 1 << 18
"""Sums that wait for a last launch, if one layer does not have more."""


def _launches(inputs: _Owned, rows: int, device: torch.device) -> Iterator[_Owned]:
    """Parts that one launch takes: of one dtype and one size of tiles, not too many inputs and layers.

    Where each fills the GPU, narrow ones are apart from those that are contracted in chunks, at whose ends loads stop.
    """
    alike: dict[tuple[torch.dtype, bool, bool], list[tuple[Tensor, Sequence[Tensor], Sequence[int]]]] = {}
    apart = sum(rows * _pairs(a.shape[1], device) for a, *_ in inputs) >= _programs_that_fill(device)
    for a, gs, owners in inputs:
        wide = apart and max(x.shape[2] for x in (a, *gs)) > CHUNK.value
        of_form = alike.setdefault((a.dtype, a.shape[1] <= _SHORT, wide), [])
        for first in range(0, len(gs), MOST_LAYERS):
            of_form.append((a, gs[first : first + MOST_LAYERS], owners[first : first + MOST_LAYERS]))
    for of_form in alike.values():
        part: list[tuple[Tensor, Sequence[Tensor], Sequence[int]]] = []
        for a, gs, owners in of_form:
            if len(part) == MOST_INPUTS or sum(len(layers) for _, layers, _ in part) + len(gs) > MOST_LAYERS:
                yield part
                part = []
            part.append((a, gs, owners))
        yield part


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Form:
    """What a launch takes from the sizes of its inputs and layers alone.

    Attributes:
        launchers: of `_sum_tiles`, for a place in 32 bits and for one in 64.
        constants: what the kernel takes last.
        numbers: of each input what `_sum_tiles` asks of its table; then, a row each, the widths of the layers.
        programs: of a row.
        room: sums of a row that programs leave.
        layers: place (of a row's first sums, times rows), and what else `_finish` asks of its table.
    """

    launchers: tuple[Launcher, Launcher]
    constants: tuple[bool, int, int]
    programs: int
    room: int
    numbers: Table
    layers: tuple[tuple[int, ...], ...]


@functools.lru_cache(maxsize=256)
def _form(
    inputs: tuple[tuple[torch.Size, tuple[int, ...], int], ...],
    outputs: tuple[tuple[int, tuple[int, ...]], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> _Form:
    """Of shape, strides and the number of layers of every input; of width and strides of every layer's gradient."""
    tiles = _tiles(inputs[0][0][1], device)
    programs, room, first_layer = 0, 0, 0
    numbers: list[tuple[int, ...]] = []
    layers: list[tuple[int, ...]] = []
    widths = [P for P, _ in outputs]
    for (_, T, D), _, count in inputs:
        pairs = _pairs(T, device)
        fields = _INPUT_FIELDS.value + count * _LAYER_FIELDS.value
        numbers.append((programs, room, pairs, D, first_layer, count))
        for number, P in enumerate(widths[first_layer : first_layer + count]):
            first = _INPUT_FIELDS.value + number * _LAYER_FIELDS.value
            layers.append((room, fields, first, pairs, tiles.rows, T, D, P))
        programs, room, first_layer = programs + pairs, room + pairs * fields, first_layer + count
    chunked = max(*(D for (*_, D), *_ in inputs), *widths) > CHUNK.value
    unused = _TABLE_FIELDS.value - 1
    blocks = [((1, tiles.rows, tiles.depth), None)] * (MOST_INPUTS + MOST_LAYERS)
    narrow, wide = (Launcher(_sum_tiles, blocks, warps=tiles.warps, stages=tiles.stages) for _ in range(2))
    return _Form(
        launchers=(narrow, wide),
        constants=(chunked, tiles.rows, tiles.depth),
        programs=programs,
        room=room,
        numbers=Table((*numbers, *((P, *[0] * unused) for P in widths))),
        layers=tuple(layers),
    )


@functools.cache
def _pairs(T: int, device: torch.device) -> int:
    """Tiles in the lower triangle."""
    count = -(-T // _tiles(T, device).rows)
    return count * (count + 1) // 2


@functools.cache
def _programs_that_fill(device: torch.device) -> int:
    """Of two launches: four for every multiprocessor, which takes one at a time."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1 << 30


def _tiles(T: int, device: torch.device) -> Tiles:
    """Measured on an H100 (docs/performance.md)."""
    if device.type != "cuda":  # the interpreter
        return Tiles(rows=16, columns=16, depth=16, warps=4, stages=2)
    if T <= _SHORT:
        return Tiles(rows=64, columns=64, depth=64, warps=4, stages=4)
    deep = torch.cuda.get_device_capability(device)[0] >= 9
    return Tiles(rows=128, columns=128, depth=64, warps=8, stages=6 if deep else 3)


@triton.jit(do_not_specialize=["place", "inputs", "B"])
def _sum_tiles(
    a0, a1, a2, a3, g0, g1, g2, g3, g4, g5, g6, g7, sums, place, table, inputs, B,
    CHUNKED: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    number = 0  # of the input that this program works on
    for other in range(1, inputs):
        number += (tl.program_id(0) >= B * tl.load(table + other * _TABLE_FIELDS)).to(tl.int32)
    a = a0
    if number == 1:
        a = a1
    if number == 2:
        a = a2
    if number == 3:
        a = a3
    own = table + number * _TABLE_FIELDS
    program = tl.program_id(0) - B * tl.load(own).to(tl.int32)
    room, pairs, D = tl.load(own + 1), tl.load(own + 2).to(tl.int32), tl.load(own + 3).to(tl.int32)
    first, layers = tl.load(own + 4).to(tl.int32), tl.load(own + 5).to(tl.int32)
    row, pair = program // pairs, program % pairs
    t, s = _tile_of_pair(pair)
    t, s = t * TILE, s * TILE
    out = sums + place + B * room + program.to(tl.int64) * (_INPUT_FIELDS + layers * _LAYER_FIELDS)
    widths = table + (inputs + first) * _TABLE_FIELDS
    gs = (g0, g1, g2, g3, g4, g5, g6, g7)
    # Two programs in one: what the loads take from L2 is what bounds them, and a tile on the diagonal needs half of it.
    if t == s:
        _sum_one(a, gs, out, row, t, s, D, widths, first, layers, True, CHUNKED, TILE, DEPTH)
    else:
        _sum_one(a, gs, out, row, t, s, D, widths, first, layers, False, CHUNKED, TILE, DEPTH)


@triton.jit
def _sum_one(
    a, gs, out, row, t, s, D, widths, first, layers,
    DIAGONAL: tl.constexpr, CHUNKED: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of M, and of the N of all its layers."""
    g0, g1, g2, g3, g4, g5, g6, g7 = gs
    M = _gram_tile(a, row, t, s, D, DIAGONAL, CHUNKED, TILE, DEPTH)
    M_tt = _diagonal_of(M, DIAGONAL, TILE)
    tl.store(out + _TRACE_M, tl.sum(M_tt, 0))
    tl.store(out + _OFF_M, _off_diagonal(M, DIAGONAL, TILE))
    out += _INPUT_FIELDS
    for layer in range(first, first + layers):
        g = g0
        if layer == 1:
            g = g1
        if layer == 2:
            g = g2
        if layer == 3:
            g = g3
        if layer == 4:
            g = g4
        if layer == 5:
            g = g5
        if layer == 6:
            g = g6
        if layer == 7:
            g = g7
        P = tl.load(widths).to(tl.int32)
        N = _gram_tile(g, row, t, s, P, DIAGONAL, CHUNKED, TILE, DEPTH)
        N_tt = _diagonal_of(N, DIAGONAL, TILE)
        inner = _total(M * N)
        tl.store(out + _INNER, inner if DIAGONAL else 2 * inner)
        tl.store(out + _OFF, _off_diagonal(N, DIAGONAL, TILE))
        tl.store(out + _DIAGONAL, tl.sum(M_tt * N_tt, 0))
        tl.store(out + _LENGTHS, tl.sum(tl.sqrt(M_tt) * tl.sqrt(N_tt), 0))
        tl.store(out + _TRACE, tl.sum(N_tt, 0))
        out += _LAYER_FIELDS
        widths += _TABLE_FIELDS


@triton.jit
def _diagonal_of(x, DIAGONAL: tl.constexpr, TILE: tl.constexpr):
    """Of all of the matrix, as far as it is in this tile."""
    position = tl.arange(0, TILE)
    if DIAGONAL:
        diagonal = tl.sum(tl.where(position[:, None] == position[None, :], x, 0.0), 1)
    else:
        diagonal = tl.zeros([TILE], tl.float32)
    return diagonal


@triton.jit
def _off_diagonal(x, DIAGONAL: tl.constexpr, TILE: tl.constexpr):
    """Squares beside the diagonal, those of a mirrored tile with it."""
    position = tl.arange(0, TILE)
    if DIAGONAL:
        off = tl.where(position[:, None] == position[None, :], 0.0, x)
        squares = _total(off * off)
    else:
        squares = 2 * _total(x * x)
    return squares


@triton.jit
def _tile_of_pair(pair):
    """The pair-th of (0, 0), (1, 0), (1, 1), (2, 0), ...; the root may be off by one in float32."""
    t = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    t = tl.where(t * (t + 1) // 2 > pair, t - 1, t)
    t = tl.where((t + 1) * (t + 2) // 2 <= pair, t + 1, t)
    return t, pair - t * (t + 1) // 2


@triton.jit
def _gram_tile(
    x, row, t, s, width, DIAGONAL: tl.constexpr, CHUNKED: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr
):
    """``x_t . x_s`` for a tile of positions; beyond T and the width the descriptor reads zeros."""
    if CHUNKED:
        total = tl.zeros([TILE, TILE], tl.float32)
        for first in range(0, width, CHUNK):
            total += _gram_chunk(x, row, t, s, first, min(first + CHUNK, width), DIAGONAL, TILE, DEPTH)
    else:
        total = _gram_chunk(x, row, t, s, 0, width, DIAGONAL, TILE, DEPTH)
    return total


@triton.jit
def _gram_chunk(x, row, t, s, first, end, DIAGONAL: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    total = tl.zeros([TILE, TILE], tl.float32)
    for k in range(first, end, DEPTH):
        x_t = x.load([row, t, k]).reshape(TILE, DEPTH)
        if DIAGONAL:
            total = tl.dot(x_t, x_t.trans(1, 0), total)
        else:
            x_s = x.load([row, s, k]).reshape(TILE, DEPTH)
            total = tl.dot(x_t, x_s.trans(1, 0), total)
    return total


@triton.jit
def _total(x):
    """Rows first, then what they left: each entry goes through as many additions as the tile is wide and high."""
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit(do_not_specialize=["B"])
def _finish(sums, terms, table, B, U: tl.constexpr, BLOCK: tl.constexpr):
    """[Note: the certificate], for one row of one layer."""
    row, entry = tl.program_id(0), tl.program_id(1)
    layer = table + entry * 8
    place, fields, first, pairs = tl.load(layer), tl.load(layer + 1), tl.load(layer + 2), tl.load(layer + 3)
    TILE, T, D, P = tl.load(layer + 4), tl.load(layer + 5), tl.load(layer + 6), tl.load(layer + 7)
    sums += place + row * pairs * fields
    own = sums + first
    summed = 1 + 2 * _gamma(2 * TILE + 4, _U32)  # float32 sums over a tile, of terms that are not negative
    length = T.to(tl.float64)
    gamma_M, gamma_N = _gamma_of_width(D, U), _gamma_of_width(P, U)
    mu_M, mu_N = _TINY * D.to(tl.float64), _TINY * P.to(tl.float64)

    # Squared token norms, summed; a computed one may lack gamma of the true one.
    a_sq = (_over_tiles(sums + _TRACE_M, pairs, fields, BLOCK) * summed + length * mu_M) / (1 - gamma_M)
    g_sq = (_over_tiles(own + _TRACE, pairs, fields, BLOCK) * summed + length * mu_N) / (1 - gamma_N)
    # Squares may be lost to underflow, and so may products of M and N.
    lost = length * length * _TINY
    off_M = tl.sqrt(_over_tiles(sums + _OFF_M, pairs, fields, BLOCK) * summed + lost)
    off_N = tl.sqrt(_over_tiles(own + _OFF, pairs, fields, BLOCK) * summed + lost)
    diagonal = _over_tiles(own + _DIAGONAL, pairs, fields, BLOCK) * summed + lost
    inner = _over_tiles(own + _INNER, pairs, fields, BLOCK)

    lengths = _over_tiles(own + _LENGTHS, pairs, fields, BLOCK) * summed / tl.sqrt((1 - gamma_M) * (1 - gamma_N))
    S = lengths + tl.sqrt(length * mu_M * g_sq) + tl.sqrt(length * mu_N * a_sq) + length * tl.sqrt(mu_M * mu_N) + lost
    on_M = gamma_M * (diagonal / (1 - gamma_M) + off_N * a_sq) + mu_M * (g_sq + length * off_N)
    on_N = gamma_N * (diagonal / (1 - gamma_N) + off_M * g_sq) + mu_N * (a_sq + length * off_M)
    both = gamma_M * gamma_N * S * S + length * (mu_M * g_sq + mu_N * a_sq) + length * length * mu_M * mu_N
    adding = _gamma(2 * TILE + 4, _U32) * (diagonal + off_M * off_N) + lost
    error = on_M + on_N + both + adding
    error = tl.where((a_sq <= _LONGEST_SQ) & (g_sq <= _LONGEST_SQ), error, float("inf"))
    rounding = (1.01 * _gamma(T + 4, U) + 1.01 * _gamma(2 * B + 4, _U32)) * S
    out = terms + entry.to(tl.int64) * 3 * B + row
    tl.store(out, tl.where(inner < 0, 0.0, inner))  # selection, not maximum, which would drop NaN
    tl.store(out + B, error)
    tl.store(out + 2 * B, rounding * rounding)


@triton.jit
def _over_tiles(field, pairs, fields, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        total += tl.load(field + pair * fields, mask=pair < pairs, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _gamma(n, u: tl.constexpr):
    """`numerics.gamma`: infinite where it would be useless."""
    spread = n * tl.full((), u, tl.float64)
    return tl.where(spread < 0.5, spread / (1 - spread), float("inf"))


@triton.jit
def _gamma_of_width(width, U: tl.constexpr):
    """Of one accumulator's chunk, and of adding up the chunks."""
    return _gamma(min(width, CHUNK), U) + _gamma((width + CHUNK - 1) // CHUNK, _U32)
