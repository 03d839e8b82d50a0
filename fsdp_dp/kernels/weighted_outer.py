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
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsdp_dp.kernels.launching import ALL, Block, Launchers, aligned_pointers, launch
from fsdp_dp.kernels.tables import Table
from fsdp_dp.kernels.tiles import Tiles, hand_scheduled, padded_tile

_SHORT_TERMS = 8192
"""So many make a tile take as long as four of a quarter of them, 0.1 ms on an H100."""

GROUP = tl.constexpr(8)
"""Tiles of consecutive programs share their columns in groups of this many rows of tiles, so that L2 holds them."""


def weighted_outers(
    sums: Sequence[tuple[Tensor, Tensor, Tensor]],
    weight_KB: Tensor,
    owners: Sequence[int] | None = None,
    onto: Sequence[Tensor | None] | None = None,
    part: int = 0,
) -> None:
    """Write ``sum_i w_i g_i^T a_i`` into ``out`` for every ``(a_BTD, g_BTP, out)``, in as few launches as it can be done.

    Args:
        sums: factors of half precision as `outer` hands them over, both of one dtype; ``out`` is float32 ``[P, D]``, or
            ``[W, P / W, D]`` with any strides but a last one of 1 (slices of a bucket). What ``g`` has beyond P is not read.
        weight_KB: float32, contiguous, non-negative; a row of weight zero does not take part, whatever it holds. ``[B]`` for
            all sums, or ``[K, B]``, of which every sum takes the line that ``owners`` says.
        onto: float32 contiguous ``[P / W, D]``, to be added to the ``part``-th slice of ``out``, each where there is one.
    """
    device = weight_KB.device
    onto = [None] * len(sums) if onto is None else onto
    if not hand_scheduled(device):
        for number, ((a, g, out), standing) in enumerate(zip(sums, onto, strict=True)):
            _weighted_outer_alone(a, g, weight_KB if owners is None else weight_KB[owners[number]], out)
            if standing is not None:
                out[part].add_(standing)
        return
    from fsdp_dp.kernels import hopper

    of_dtype: dict[torch.dtype, list[_Owned]] = {}
    for number, one in enumerate(sums):
        of_dtype.setdefault(one[0].dtype, []).append((*one, 0 if owners is None else owners[number], onto[number]))
    for dtype, alike in of_dtype.items():
        for first in range(0, len(alike), hopper.MOST):
            _weighted_outers_by_hand(alike[first : first + hopper.MOST], weight_KB, dtype, part)


_Owned = tuple[Tensor, Tensor, Tensor, int, Tensor | None]


def _weighted_outers_by_hand(sums: Sequence[_Owned], weight_KB: Tensor, dtype: torch.dtype, part: int) -> None:
    """In one launch, of the tiles of one sum after another."""
    gs, as_, outs = [g for _, g, *_ in sums], [a for a, *_ in sums], [out for _, _, out, *_ in sums]
    form = _form(
        tuple(
            [
                (a.shape, a.stride(), g.shape[2], g.stride(), *_strides(out), owner, onto is not None)
                for a, g, out, owner, onto in sums
            ]
        ),
        part,
        dtype,
        weight_KB.device,
    )
    absent = form.absent
    pointers = (*outs, *outs[:1] * absent)
    if form.adds:
        ontos = [out if onto is None else onto for _, _, out, _, onto in sums]
        pointers += (*ontos, *ontos[:1] * absent, weight_KB)
    else:
        pointers += (weight_KB,) * (len(pointers) + 1)
    on_16 = aligned_pointers(pointers)
    constants = (form.adds, form.aligned and on_16 is ALL, *form.constants)
    form.launcher(on_16)(
        (form.programs, 1, 1),
        (*gs, *gs[:1] * absent, *as_, *as_[:1] * absent),
        (*pointers, form.table.on(weight_KB.device), *form.counts, *constants),
    )


def _outputs(out: Tensor) -> int:
    """P, of which ``g`` may have more, padded with zeros."""
    return out.shape[0] if out.ndim == 2 else out.shape[0] * out.shape[1]


def _strides(out: Tensor) -> tuple[int, int, int, int]:
    """How many slices there are, and rows of one; how far apart slices are, and rows."""
    if out.ndim == 3:
        slices, rows, _ = out.shape
        slice_stride, row_stride, _ = out.stride()
        return slices, rows, slice_stride, row_stride
    return 1, out.shape[0], 0, out.stride(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Form:
    """What a launch takes from the shapes and strides of its tensors alone.

    Attributes:
        adds: something is added to some of the sums.
        aligned: rows and slices of all outputs are whole units of 16 bytes apart.
        counts: of the sums, of the rows, of all tiles.
        absent: sums that the kernel might have been given besides.
    """

    launcher: Launchers
    adds: bool
    aligned: bool
    programs: int
    table: Table
    counts: tuple[int, int, int]
    absent: int
    constants: tuple[Any, ...]


_OneForm = tuple[torch.Size, tuple[int, ...], int, tuple[int, ...], int, int, int, int, int, bool]
"""Of a sum: shape and strides of ``a``, width and strides of ``g``, `_strides` of ``out``, its owner, whether it is added."""


@functools.lru_cache(maxsize=256)
def _form(sums: tuple[_OneForm, ...], part: int, dtype: torch.dtype, device: torch.device) -> _Form:
    from fsdp_dp.kernels import hopper

    B = sums[0][0][0]
    sizes = [(T, slices * rows, D) for (_, T, D), _, _, _, slices, rows, *_ in sums]
    places = [(rows, slice_stride, row_stride) for *_, rows, slice_stride, row_stride, _, _ in sums]
    tiles = _tiles(tuple((P, D) for _, P, D in sizes), device)
    kernel, constants, layouts = hopper.form_of_weighted_outers(dtype, tiles)
    *first_tiles, in_all = itertools.accumulate((_count(P, D, tiles) for _, P, D in sizes), initial=0)
    owners = [owner for *_, owner, _ in sums]
    own = [(part * rows, (part + 1) * rows) if adds else (0, 0) for *_, rows, _, _, _, adds in sums]
    entries = zip(sizes, places, first_tiles, owners, own, strict=True)
    blocks = [((1, tiles.depth, tiles.rows), layouts[0])] * hopper.MOST
    blocks += [((1, tiles.depth, tiles.columns), layouts[1])] * hopper.MOST
    return _Form(
        launcher=Launchers(kernel, blocks, warps=tiles.warps),
        adds=any(adds for *_, adds in sums),
        aligned=all(stride % 16 == 0 for _, *both in places for stride in both),
        programs=_programs(B * max(T for T, _, _ in sizes), in_all, device),
        table=Table(tuple((*size, *place, first, owner * B, *rows) for size, place, first, owner, rows in entries)),
        counts=(len(sums), B, in_all),
        absent=hopper.MOST - len(sums),
        constants=constants,
    )


def _programs(terms: int, tiles: int, device: torch.device) -> int:
    """Each of which makes up to four tiles, if these are short: stages of one are filled while another is stored.

    No more, and many programs for every multiprocessor: some of these are taken by collectives for a while, and all of
    them are asked for by a collective that waits to begin.
    """
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return -(-tiles // max(1, min(4, _SHORT_TERMS // terms, tiles // (4 * multiprocessors))))


def _count(P: int, D: int, tiles: Tiles) -> int:
    return int(triton.cdiv(P, tiles.rows) * triton.cdiv(D, tiles.columns))


def _weighted_outer_alone(a_BTD: Tensor, g_BTP: Tensor, weight_B: Tensor, out: Tensor) -> None:
    """In Triton, which the interpreter runs as well."""
    B, T, D = a_BTD.shape
    P = _outputs(out)
    _, rows, slice_stride, row_stride = _strides(out)
    tiles = _tiles(((P, D),), a_BTD.device)
    launch(
        _weighted_outer,
        (_count(P, D, tiles), 1, 1),
        (
            Block(g_BTP, (1, tiles.depth, tiles.rows)),
            Block(a_BTD, (1, tiles.depth, tiles.columns)),
            *(weight_B, out, B, T, P, D, rows, slice_stride, row_stride),
            *(tiles.depth, tiles.rows, tiles.columns),
        ),
        warps=tiles.warps,
        stages=tiles.stages,
    )


@functools.cache
def _tiles(sums: tuple[tuple[int, int], ...], device: torch.device) -> Tiles:
    """For sums of these ``(P, D)`` in one launch: wide tiles, unless these are few. Measured on an H100 (see docs)."""
    if device.type != "cuda":  # the interpreter: small, and of three different sizes
        return Tiles(rows=32, columns=64, depth=16, warps=4, stages=2)
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 9:
        return Tiles(rows=128, columns=128, depth=64, warps=8, stages=3)
    wide = Tiles(rows=128, columns=256, depth=64, warps=8, stages=4)
    if 3 * sum(_count(P, D, wide) for P, D in sums) < 2 * properties.multi_processor_count:
        return Tiles(rows=64, columns=256, depth=64, warps=4, stages=5)
    return wide


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
