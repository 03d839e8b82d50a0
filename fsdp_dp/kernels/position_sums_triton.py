"""Per-sample gradients of biases and of norm layers' scales, of several layers in one pass and one launch.

In the step: `vector_gradients` comes here on a GPU; `layers.linear` and `layers.normalization` have the torch references.
A program goes through some positions of one row of one layer: ``sum_t g_t``, and for a norm layer ``sum_t g_t x_t`` with
``x = (a - mean) / deviation`` in float32. Wide layers without a norm are cut into columns.
"""

# Triton's jit reads no annotations but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsdp_dp.kernels.launching import Launchers, aligned_pointers
from fsdp_dp.kernels.position_sums import MOST_LAYERS, Layer
from fsdp_dp.kernels.tables import Table

_ELEMENTS = 4096
"""Of a program's tile: some positions, as wide as the layer."""

_COLUMNS = 1024
"""The widest tile where no layer is normalized."""

_WARPS = 8

_PROGRAMS = 512
"""Enough of them to fill a GPU a few times over, however few the rows are."""

_MOST_PROGRAMS = 65535
"""Of a grid's second dimension: a very narrow norm layer beside a very wide bias would have more."""

_LAYER, _T, _C, _FIRST, _NORMED, _CENTERED, _EPS, _SCALE, _SHIFT = (tl.constexpr(i) for i in range(9))
_FIELDS = tl.constexpr(9)

_Shape = tuple[int, int, bool, bool, float, int, int]


def position_sums(layers: Sequence[Layer], columns: int) -> Tensor:
    """See `position_sums`."""
    gs = [layer.g_BTC for layer in layers]
    B, device = gs[0].shape[0], gs[0].device
    shapes = tuple((*x.g_BTC.shape[1:], x.a_BTC is not None, *x[2:]) for x in layers)
    form = _form(B, shapes, gs[0].dtype)
    unused = MOST_LAYERS - len(layers)
    a = [g if x.a_BTC is None else x.a_BTC for x, g in zip(layers, gs, strict=True)]
    sums = torch.empty(B, form.parts, columns, dtype=torch.float32, device=device)
    pointers = (*gs, *gs[:1] * unused, *a, *a[:1] * unused)
    form.launcher(aligned_pointers(pointers))(
        (B, len(form.programs.rows), form.parts),
        (),
        (form.programs.on(device), sums, columns, *pointers, *form.constants),
    )
    return sums.sum(1) if form.parts > 1 else sums[:, 0]


class _Form(NamedTuple):
    """In how many parts rows are cut, what the programs do, and what they are compiled for."""

    launcher: Launchers
    parts: int
    programs: Table
    constants: tuple[bool, bool, int, int]


@functools.lru_cache(maxsize=1024)
def _form(B: int, layers: tuple[_Shape, ...], dtype: torch.dtype) -> _Form:
    """``dtype`` is what the launcher is for."""
    normed = [C for _, C, is_normed, *_ in layers if is_normed]
    width = triton.next_power_of_2(max(normed) if normed else min(_COLUMNS, max(C for _, C, *_ in layers)))
    while sum(triton.cdiv(C, width) for _, C, *_ in layers) > _MOST_PROGRAMS:
        width *= 2
    height = max(1, _ELEMENTS // width)
    programs = tuple(
        (number, T, C, first, int(is_normed), int(centered), _bits(eps), scale, shift)
        for number, (T, C, is_normed, eps, centered, scale, shift) in enumerate(layers)
        for first in range(0, C, width)
    )
    longest = max(T for T, *_ in layers)
    parts = min(triton.cdiv(longest, height), triton.cdiv(_PROGRAMS, B * len(programs)))
    centers, shifts = any(centered for *_, centered, _, _ in layers), any(shift >= 0 for *_, shift in layers)
    constants = (centers, shifts, height, width)
    return _Form(Launchers(_position_sums, warps=_WARPS), parts, Table(programs), constants)


def _bits(x: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", x))[0])


@triton.jit(do_not_specialize=["N"])
def _position_sums(
    programs, out, N, g0, g1, g2, g3, g4, g5, g6, g7, a0, a1, a2, a3, a4, a5, a6, a7,
    CENTERS: tl.constexpr, SHIFTS: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    own = programs + _FIELDS * tl.program_id(1)
    layer = tl.load(own + _LAYER)
    g = _choose(layer, g0, g1, g2, g3, g4, g5, g6, g7)
    T, C = tl.load(own + _T).to(tl.int32), tl.load(own + _C).to(tl.int32)
    column = tl.load(own + _FIRST).to(tl.int32) + tl.arange(0, COLUMNS)
    wide = column < C
    positions = tl.cdiv(T, tl.num_programs(2))
    first = part * positions
    end = min(first + positions, T)
    scale_HC = tl.zeros([HEIGHT, COLUMNS], tl.float32)
    shift_HC = tl.zeros([HEIGHT, COLUMNS], tl.float32)
    if tl.load(own + _NORMED) != 0:
        a = _choose(layer, a0, a1, a2, a3, a4, a5, a6, a7)
        eps = tl.load(own + _EPS).to(tl.int32).to(tl.float32, bitcast=True)
        centered = tl.load(own + _CENTERED) != 0
        place, inside = _places(row, first, end, T, C, column, wide, HEIGHT)
        next_a = tl.load(a + place, mask=inside, other=0.0)
        next_g = tl.load(g + place, mask=inside, other=0.0)
        for t in range(first, end, HEIGHT):
            x, g_HC, here = next_a.to(tl.float32), next_g.to(tl.float32), inside
            # What comes next is on its way while this is summed.
            place, inside = _places(row, t + HEIGHT, end, T, C, column, wide, HEIGHT)
            next_a = tl.load(a + place, mask=inside, other=0.0)
            next_g = tl.load(g + place, mask=inside, other=0.0)
            if CENTERS:
                mean = tl.where(centered, tl.sum(x, 1) / C, 0.0)
                x = tl.where(here, x - mean[:, None], 0.0)
            # Beyond the end everything is zero, eps may be too: 0 / 0 there must not reach the sum.
            is_there = t + tl.arange(0, HEIGHT) < end
            reciprocal = tl.where(is_there, 1.0 / tl.sqrt(tl.sum(x * x, 1) / C + eps), 0.0)
            scale_HC += g_HC * (x * reciprocal[:, None])
            if SHIFTS:
                shift_HC += g_HC
    elif SHIFTS:
        for t in range(first, end, HEIGHT):
            place, inside = _places(row, t, end, T, C, column, wide, HEIGHT)
            shift_HC += tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
    out += (row * tl.num_programs(2) + part) * N
    scale = tl.load(own + _SCALE)
    if scale >= 0:
        tl.store(out + scale + column, tl.sum(scale_HC, 0), mask=wide)
    if SHIFTS:
        shift = tl.load(own + _SHIFT)
        if shift >= 0:
            tl.store(out + shift + column, tl.sum(shift_HC, 0), mask=wide)


@triton.jit
def _places(row, t, end, T, C, column, wide, HEIGHT: tl.constexpr):
    """Of some positions of a row: where their columns lie, and which of them are there."""
    position = t + tl.arange(0, HEIGHT)
    return (row * T + position)[:, None] * C + column[None, :], (position < end)[:, None] & wide[None, :]


@triton.jit
def _choose(number, x0, x1, x2, x3, x4, x5, x6, x7):
    x = x0
    if number == 1:
        x = x1
    if number == 2:
        x = x2
    if number == 3:
        x = x3
    if number == 4:
        x = x4
    if number == 5:
        x = x5
    if number == 6:
        x = x6
    if number == 7:
        x = x7
    return x
