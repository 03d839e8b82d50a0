"""Norms and weighted sums of the stored gradients of many vectors, side by side ``[B, N]``, in one launch each.

In the step: `together` comes here for float32 vectors on a GPU; `gradients.stored_norm_terms` and
`gradients.Materialized.weighted_sum` are the references. Squares of float32 numbers are exact in float64 and do not vanish
there, so a norm has the error of float64 sums alone.
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

from fsdp_dp.kernels.launching import Launchers, aligned_pointers, launch
from fsdp_dp.kernels.tables import Table
from fsdp_dp.numerics import gamma

_COLUMNS = 1024
_SUMMED_COLUMNS = 128


@functools.lru_cache(maxsize=1024)
def _runs(widths: tuple[int, ...], owners: tuple[int, ...]) -> Table:
    """First column, last one and owner of every run of vectors of one owner."""
    runs: list[tuple[int, int, int]] = []
    end = 0
    for width, owner in zip(widths, owners, strict=True):
        first, end = end, end + width
        if runs and runs[-1][2] == owner:
            runs[-1] = (runs[-1][0], end, owner)
        else:
            runs.append((first, end, owner))
    return Table(tuple(runs))


def squared_norms(
    joined_BN: Tensor, widths: tuple[int, ...], owners: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """See `vectors`."""
    B, N = joined_BN.shape
    runs, device = _runs(widths, owners), joined_BN.device
    terms = torch.empty(len(runs.rows), 3, B, dtype=torch.float64, device=device)
    relative, rounding = gamma(N + 8, torch.float64), gamma(4, torch.float32) ** 2
    launch(
        _squared_norms, (B, len(runs.rows), 1),
        (joined_BN, terms, runs.on(device), B, joined_BN.stride(0), relative, rounding, _COLUMNS), warps=4,
    )  # fmt: skip
    return terms, tuple(owner for *_, owner in runs.rows)


@triton.jit(do_not_specialize=["B", "stride"])
def _squared_norms(
    x, terms, runs, B, stride, RELATIVE: tl.constexpr, ROUNDING: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row, run = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(runs + 3 * run).to(tl.int32), tl.load(runs + 3 * run + 1).to(tl.int32)
    own = x + row.to(tl.int64) * stride
    total = tl.zeros([COLUMNS], tl.float64)
    for start in range(first, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        value = tl.load(own + column, mask=column < end, other=0.0).to(tl.float64)
        total += value * value
    square = tl.sum(total, 0)
    out = terms + run.to(tl.int64) * 3 * B + row
    tl.store(out, square)
    tl.store(out + B, square * tl.full((), RELATIVE, tl.float64))
    tl.store(out + 2 * B, square * tl.full((), ROUNDING, tl.float64))


def weighted_sum(
    joined_BN: Tensor, weight_KB: Tensor, widths: tuple[int, ...], owners: tuple[int, ...], places: Sequence[Tensor]
) -> Tensor:
    """See `vectors`."""
    B, device = joined_BN.shape[0], joined_BN.device
    if places:
        out = places[0]
        origin, bytes_of_one = out.data_ptr(), out.element_size()
        offsets = tuple((place.data_ptr() - origin) // bytes_of_one for place in places)
        programs = _programs_of_places(widths, owners, offsets, out.shape[0], out.stride(0))
    else:
        out = torch.empty(sum(widths), dtype=torch.float32, device=device)
        programs = _programs(_runs(widths, owners))
    pointers = (joined_BN, weight_KB, out)
    arguments = (*pointers, programs.on(device), B, joined_BN.stride(0), _SUMMED_COLUMNS)
    _launcher_of_sums()(aligned_pointers(pointers))((len(programs.rows), 1, 1), (), arguments)
    return out


@functools.cache
def _launcher_of_sums() -> Launchers:
    return Launchers(_weighted_sum, warps=4)


@functools.lru_cache(maxsize=1024)
def _programs(runs: Table) -> Table:
    """What a program sums: its columns, their owner, and where their sums go."""
    return Table(
        tuple((at, end, owner, at) for first, end, owner in runs.rows for at in range(first, end, _SUMMED_COLUMNS))
    )


@functools.lru_cache(maxsize=1024)
def _programs_of_places(
    widths: tuple[int, ...], owners: tuple[int, ...], offsets: tuple[int, ...], shards: int, stride: int
) -> Table:
    """The same, shard after shard of every vector."""
    programs: list[tuple[int, ...]] = []
    begin = 0
    for width, owner, offset in zip(widths, owners, offsets, strict=True):
        part = width // shards
        for shard in range(shards):
            first = begin + shard * part
            for at in range(first, first + part, _SUMMED_COLUMNS):
                programs.append((at, first + part, owner, offset + shard * stride + at - first))
        begin += width
    return Table(tuple(programs))


@triton.jit(do_not_specialize=["B", "stride"])
def _weighted_sum(x, weight, out, programs, B, stride, COLUMNS: tl.constexpr):
    own = programs + 4 * tl.program_id(0)
    at, end = tl.load(own).to(tl.int32), tl.load(own + 1).to(tl.int32)
    column = at + tl.arange(0, COLUMNS)
    inside = column < end
    weight += tl.load(own + 2) * B
    of_row = x + column
    total = tl.zeros([COLUMNS], tl.float32)
    for i in range(B):
        w = tl.load(weight + i)
        if w != 0:  # what a row of weight zero holds may be anything
            total += w * tl.load(of_row, mask=inside, other=0.0)
        of_row += stride
    tl.store(out + tl.load(own + 3) + tl.arange(0, COLUMNS), total, mask=inside)
