"""The weights of some groups' rows in one launch, where torch has fifty small ones a group: with a group a layer, these
would be most.

In the step: `clipping.row_weights` comes here for float32 sums on a GPU; its torch lines are the reference. A program has
some rows and goes through the groups: it adds up what was measured of a group's parameters, and weighs. All of it is
float64, correctly rounded operation by operation as in torch, but for what is fused to one rounding.
"""

# Triton's jit reads no annotations but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsdp_dp.kernels.launching import Launchers, aligned_pointers
from fsdp_dp.kernels.tables import Table

_BLOCK, _ENTRIES = 32, 16
"""Rows of a program, and entries that it reads at a time."""

_FUNCTIONS = {"abadi": 0, "automatic": 1, "normalized": 2}


def weigh(
    terms_n3B: Tensor,
    owners: Sequence[int],
    mask_B: Tensor,
    totals: tuple[Tensor, Tensor] | None,
    *,
    bounds: Sequence[float],
    loss_factor: float,
    certified: bool,
    clip_function: str,
    stability: float,
    most: float,
    longest: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``weight_KB`` (float32), ``keep_KB`` and ``norm_KB`` (float64) of `clipping.RowWeights`.

    Args:
        terms_n3B: norm_sq, error, rounding_sq of whatever was measured, float64 and contiguous.
        owners: which of the K groups each of the n belongs to.
        totals: ``norm_sq_B`` and ``dropped_B`` of `clipping.RowTotals`, to add to.
        bounds: of the K groups.
        most: no weight is larger; ``longest``: a row longer than so many times the bound is not kept.
    """
    K, B, device = len(bounds), mask_B.shape[0], mask_B.device
    weight_KB = torch.empty(K, B, dtype=torch.float32, device=device)
    keep_KB = torch.empty(K, B, dtype=torch.bool, device=device)
    norm_KB = torch.empty(K, B, dtype=torch.float64, device=device)
    entries = _entries_of_groups(tuple(owners), K).on(device)
    of_groups = _table_of_bounds(tuple(bounds)).on(device)
    numbers = (_bits(loss_factor), _bits(stability))
    constants = (totals is not None, certified, _FUNCTIONS[clip_function], most, longest, _BLOCK, _ENTRIES)
    pointers = (terms_n3B, entries, of_groups, mask_B, weight_KB, keep_KB, norm_KB, *(totals or (norm_KB, keep_KB)))
    launcher = _launchers(constants)(aligned_pointers(pointers))
    launcher((-(-B // _BLOCK), 1, 1), (), (*pointers, K, B, *numbers, *constants))
    return weight_KB, keep_KB, norm_KB


@functools.cache
def _launchers(constants: tuple[Any, ...]) -> Launchers:
    return Launchers(_weigh, warps=4)


@functools.lru_cache(maxsize=1024)
def _table_of_bounds(bounds: tuple[float, ...]) -> Table:
    return Table((tuple(map(_bits, bounds)),))


@functools.lru_cache(maxsize=1024)
def _entries_of_groups(owners: tuple[int, ...], groups: int) -> Table:
    """Where the entries of each group begin, where those of the last one end; then the entries, group by group."""
    of_groups = [[n for n, owner in enumerate(owners) if owner == group] for group in range(groups)]
    starts = [groups + 1]
    for entries in of_groups:
        starts.append(starts[-1] + len(entries))
    return Table(((*starts, *(n for entries in of_groups for n in entries)),))


def _bits(x: float) -> int:
    """Of a float64: as a number, Triton would hand it over in float32. Its sign bit makes it 64 bits, whatever it is."""
    return int.from_bytes(struct.pack("<d", -x), "little", signed=True)


@triton.jit(do_not_specialize=["K", "B", "factor", "stability"])
def _weigh(
    terms, entries, bounds, mask, weight, keep, norm, norm_sq_sum, dropped, K, B, factor, stability,
    ADDS: tl.constexpr, CERTIFIED: tl.constexpr, FUNCTION: tl.constexpr,
    MOST: tl.constexpr, LONGEST: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < B
    factor, stability = _number(factor), _number(stability)
    in_use = tl.load(mask + row, mask=inside, other=0) != 0
    squares = tl.zeros([BLOCK], tl.float64)
    drops = tl.zeros([BLOCK], tl.int32)
    down = tl.full((), 1 - 2.0**-50, tl.float64)
    one = tl.full((), 1.0, tl.float64)
    for group in range(K):
        bound = _number(tl.load(bounds + group))
        first, end = tl.load(entries + group).to(tl.int32), tl.load(entries + group + 1).to(tl.int32)
        square = _summed(terms, entries, first, end, row, inside, B, BLOCK, ENTRIES)
        computed = tl.sqrt(tl.where(square < 0, 0.0, square)) * factor
        length = computed
        if CERTIFIED:
            error = _summed(terms + B, entries, first, end, row, inside, B, BLOCK, ENTRIES)
            rounding = tl.sqrt(_summed(terms + 2 * B, entries, first, end, row, inside, B, BLOCK, ENTRIES))
            length = (tl.sqrt(square + error) + rounding) * tl.full((), 1 + 2.0**-40, tl.float64) * factor
        # A comparison with NaN is false, and so is one of infinity with a number: such rows are not kept.
        kept = (length <= bound * tl.full((), LONGEST, tl.float64)) & in_use
        if FUNCTION == 0:
            w = tl.where(length > bound, bound / length * down, one)
        elif FUNCTION == 1:
            w = bound / (length + stability) * down
        else:
            w = tl.where(length > 0, bound / length * down, 0.0)
        most = tl.full((), MOST, tl.float64)
        w = tl.where(w > most, most, w) * factor
        w = tl.where(kept, w, 0.0)
        nearest = w.to(tl.float32)
        below = (nearest.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
        place = group * B + row
        tl.store(weight + place, tl.where(nearest.to(tl.float64) > w, below, nearest), mask=inside)
        tl.store(keep + place, kept, mask=inside)
        tl.store(norm + place, computed, mask=inside)
        squares += computed * computed
        drops |= (kept == 0).to(tl.int32)
    if ADDS:
        total = tl.load(norm_sq_sum + row, mask=inside, other=0.0)
        tl.store(norm_sq_sum + row, total + squares, mask=inside)
        before = tl.load(dropped + row, mask=inside, other=0) != 0
        tl.store(dropped + row, before | (drops != 0), mask=inside)


@triton.jit
def _summed(field, entries, first, end, row, inside, B, BLOCK: tl.constexpr, ENTRIES: tl.constexpr):
    """One of the three terms over the entries of a group."""
    total = tl.zeros([ENTRIES, BLOCK], tl.float64)
    for place in range(first, end, ENTRIES):
        at = place + tl.arange(0, ENTRIES)
        entry = tl.load(entries + at, mask=at < end, other=0)
        there = (at < end)[:, None] & inside[None, :]
        total += tl.load(field + entry[:, None] * (3 * B) + row[None, :], mask=there, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _number(bits):
    """The float64 that `_bits` was given."""
    return -bits.to(tl.float64, bitcast=True)
