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

from fsdp_dp.kernels.launching import Block, launch
from fsdp_dp.kernels.tables import table
from fsdp_dp.kernels.tiles import Tiles, hand_scheduled, padded_tile

_SHORT_TERMS = 8192
"""So many make a tile take as long as four of a quarter of them, 0.1 ms on an H100."""

GROUP = tl.constexpr(8)
"""Tiles of consecutive programs share their columns in groups of this many rows of tiles, so that L2 holds them."""


def weighted_outers(
    sums: Sequence[tuple[Tensor, Tensor, Tensor]], weight_KB: Tensor, owners: Sequence[int] | None = None
) -> None:
    """Write ``sum_i w_i g_i^T a_i`` into ``out`` for every ``(a_BTD, g_BTP, out)``, in as few launches as it can be done.

    Args:
        sums: factors of half precision as `outer` hands them over, both of one dtype; ``out`` is float32 ``[P, D]``, or
            ``[W, P / W, D]`` with any strides but a last one of 1 (slices of a bucket). What ``g`` has beyond P is not read.
        weight_KB: float32, contiguous, non-negative; a row of weight zero does not take part, whatever it holds. ``[B]`` for
            all sums, or ``[K, B]``, of which every sum takes the line that ``owners`` says.
    """
    device = weight_KB.device
    if not hand_scheduled(device):
        for number, (a, g, out) in enumerate(sums):
            _weighted_outer_alone(a, g, weight_KB if owners is None else weight_KB[owners[number]], out)
        return
    from fsdp_dp.kernels import hopper

    of_dtype: dict[torch.dtype, list[_Owned]] = {}
    for number, one in enumerate(sums):
        of_dtype.setdefault(one[0].dtype, []).append((*one, 0 if owners is None else owners[number]))
    for dtype, alike in of_dtype.items():
        for first in range(0, len(alike), hopper.MOST):
            _weighted_outers_by_hand(alike[first : first + hopper.MOST], weight_KB, dtype)


_Owned = tuple[Tensor, Tensor, Tensor, int]


def _weighted_outers_by_hand(sums: Sequence[_Owned], weight_KB: Tensor, dtype: torch.dtype) -> None:
    """In one launch, of the tiles of one sum after another."""
    outs = [out for _, _, out, _ in sums]
    B = weight_KB.shape[-1]
    form = _form(tuple((a.shape[1], _outputs(out), a.shape[2]) for a, _, out, _ in sums), dtype, weight_KB.device)
    strides = [_strides(out) for out in outs]
    entries = tuple(
        (*sizes, *places, first, owner * B)
        for sizes, places, first, (*_, owner) in zip(form.sizes, strides, form.first_tiles, sums, strict=True)
    )
    on_16 = tuple(x.data_ptr() % 16 == 0 for x in (weight_KB, *outs))
    aligned = all(on_16) and all(stride % 16 == 0 for _, *both in strides for stride in both)
    gs = [Block(g, form.block_of_g, form.layout_of_g) for _, g, *_ in sums]
    as_ = [Block(a, form.block_of_a, form.layout_of_a) for a, *_ in sums]
    launch(
        form.kernel,
        (form.programs(B), 1, 1),
        (
            *(gs + gs[:1] * form.absent),
            *(as_ + as_[:1] * form.absent),
            *(outs + outs[:1] * form.absent),
            *(weight_KB, table(entries, weight_KB.device), len(sums), B, form.tiles_in_all),
            *(aligned, *form.constants),
        ),
        warps=form.tiles.warps,
        key=(dtype, form.tiles.rows, aligned, on_16),
    )


def _outputs(out: Tensor) -> int:
    """P, of which ``g`` may have more, padded with zeros."""
    return out.shape[0] if out.ndim == 2 else out.shape[0] * out.shape[1]


def _strides(out: Tensor) -> tuple[int, int, int]:
    """How many rows a slice has, and how far apart slices and rows are."""
    if out.ndim == 3:
        return out.shape[1], out.stride(0), out.stride(1)
    return out.shape[0], 0, out.stride(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Form:
    """What a launch takes from ``sizes`` of the sums, (T, P, D) each, alone."""

    sizes: tuple[tuple[int, int, int], ...]
    kernel: Any
    tiles: Tiles
    first_tiles: tuple[int, ...]
    tiles_in_all: int
    multiprocessors: int
    absent: int
    block_of_g: tuple[int, int, int]
    block_of_a: tuple[int, int, int]
    layout_of_g: Any
    layout_of_a: Any
    constants: tuple[Any, ...]

    def programs(self, rows: int) -> int:
        """Each of which makes up to four tiles, if these are short: stages of one are filled while another is stored.

        No more, and many programs for every multiprocessor: some of these are taken by collectives for a while, and all of
        them are asked for by a collective that waits to begin.
        """
        terms = rows * max(T for T, _, _ in self.sizes)
        each = min(4, _SHORT_TERMS // terms, self.tiles_in_all // (4 * self.multiprocessors))
        return -(-self.tiles_in_all // max(1, each))


@functools.lru_cache(maxsize=1024)
def _form(sizes: tuple[tuple[int, int, int], ...], dtype: torch.dtype, device: torch.device) -> _Form:
    from fsdp_dp.kernels import hopper

    tiles = _tiles(tuple((P, D) for _, P, D in sizes), device)
    kernel, constants, layouts = hopper.form_of_weighted_outers(dtype, tiles)
    *first_tiles, in_all = itertools.accumulate((_count(P, D, tiles) for _, P, D in sizes), initial=0)
    return _Form(
        sizes=sizes,
        kernel=kernel,
        tiles=tiles,
        first_tiles=tuple(first_tiles),
        tiles_in_all=in_all,
        multiprocessors=torch.cuda.get_device_properties(device).multi_processor_count,
        absent=hopper.MOST - len(sizes),
        block_of_g=(1, tiles.depth, tiles.rows),
        block_of_a=(1, tiles.depth, tiles.columns),
        layout_of_g=layouts[0],
        layout_of_a=layouts[1],
        constants=constants,
    )


def _count(P: int, D: int, tiles: Tiles) -> int:
    return int(triton.cdiv(P, tiles.rows) * triton.cdiv(D, tiles.columns))


def _weighted_outer_alone(a_BTD: Tensor, g_BTP: Tensor, weight_B: Tensor, out: Tensor) -> None:
    """In Triton, which the interpreter runs as well."""
    B, T, D = a_BTD.shape
    P = _outputs(out)
    rows, slice_stride, row_stride = _strides(out)
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
