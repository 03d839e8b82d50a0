"""The norm of a table that is also the output head: ``|X + Y|^2 = |X|^2 + |Y|^2 + 2 <X, Y>``, in two launches.

In the step: `gradients.TiedSum.norm_terms` comes here on a GPU; the rest of it is the torch reference. X is the head's
outer product, whose norm terms are given. Y has the row ``h_t`` at index ``x_t``, so that

    <X, Y> = sum_t h_t . C_t    with    C_t = sum_s g_s[x_t] a_s.

A program of the first launch has some positions t of a row, some columns d, and a part of the positions s. It gathers
``g_s[x_t]`` as the first operand of a product whose second is ``a``, both as autograd had them, so that half-precision
numbers are multiplied as they are; then it multiplies what it has of C by ``h``, which is float32, and leaves three sums:
of ``<X, Y>``, of the bound on its rounding, and of ``|h|^2``. Nothing of ``[S, T]`` or ``[T, D]`` reaches memory. The second
launch adds up the programs' sums in a fixed order. Slots without a value (`IndexedRows.compress` leaves them at the end)
are not gathered for, and a program that has no others makes no product.

[Note: the certificate]. Of a program, let ``n`` be how many s it has, ``C^`` the computed tile, ``|a_s|`` and ``|h_t|``
norms over its columns alone. Each entry is one float32 accumulation of n products, which half-precision factors make
exactly, in steps of roundoff u:

    |C^_td - C_td| <= gamma(n, u) sum_s |g_s[x_t]| |a_sd| + mu(n),

with ``mu`` of `numerics.underflow`. Multiplied by ``|h_td|`` and summed over the columns, by Cauchy-Schwarz,

    |sum_td (C^ - C)_td h_td| <= sum_t |h_t| (gamma(n, u) W_t + mu(n) sqrt(columns)),    W_t = sum_s |g_s[x_t]| |a_s|.

The product of two float32 numbers is exact in float64, and so is no number lost there. Sums of them, over a tile and over
programs, are float64 with m additions: at most ``gamma(m, 2^-53)`` of ``sum |C^_td h_td|``, itself at most
``1 + gamma(n, u)`` times ``sum_t |h_t| W_t``, underflow aside; twice ``gamma(m)`` covers that and the rounding of the bound.
``W`` is a float32 sum of terms that are not negative: it may lack ``gamma`` of as many roundings as it goes through (the
square, the columns, root, product, steps, a step's positions; the root may be an approximate one) and what underflow takes,
which is added to the squares before the root and to the sum after it. A token beyond 2^63 makes the bound infinite.

``|Y|^2`` is a float64 sum of exact squares. All that follows is float64.

[Legend]: B rows, S positions of the head, T slots of the table's gradient, D columns, V vocabulary.
"""

# Triton's jit reads no annotations but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsdp_dp.kernels.launching import launch
from fsdp_dp.norm_terms import NormTerms
from fsdp_dp.numerics import gamma, tensor_core_roundoff, underflow, unit_roundoff

_TINY = tl.constexpr(underflow(1, torch.float32))
_U32 = tl.constexpr(unit_roundoff(torch.float32))
_U64 = tl.constexpr(unit_roundoff(torch.float64))
_ROUNDING = tl.constexpr(gamma(4, torch.float32) ** 2)
"""Of a stored gradient, as `gradients.stored_norm_terms` has it."""

_LONGEST = tl.constexpr(2.0**63)
_BLOCK = 128
"""Programs' sums that the second launch reads at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tiles:
    """``slots x columns`` of C, ``depth`` positions of the head at a time; a program has at most ``part`` of these."""

    slots: int
    columns: int
    depth: int
    part: int
    warps: int


@functools.cache
def _tiles(device: torch.device) -> _Tiles:
    """Wide ones, as every tile of columns gathers anew."""
    if device.type != "cuda":  # the interpreter: small, and of four different sizes
        return _Tiles(slots=16, columns=32, depth=16, part=48, warps=4)
    return _Tiles(slots=64, columns=256, depth=32, part=1024, warps=8)


def norm_terms(a_BSD: Tensor, g_BSV: Tensor, h_BTD: Tensor, index_BT: Tensor, head: NormTerms) -> NormTerms:
    """See `tied`."""
    (B, S, D), T, device = a_BSD.shape, h_BTD.shape[1], a_BSD.device
    tiles = _tiles(device)
    programs = -(-T // tiles.slots) * -(-D // tiles.columns) * -(-S // tiles.part)
    sums = torch.empty(3, B, programs, dtype=torch.float64, device=device)
    terms = torch.empty(3, B, dtype=torch.float64, device=device)
    a, h = _in_rows(a_BSD), _in_rows(h_BTD)
    u = tensor_core_roundoff(device)
    launch(
        _sum_tiles, (B * programs, 1, 1),
        (a, g_BSV, h, index_BT, sums, B, S, T, D, programs, *a.stride()[:2], *g_BSV.stride(), *h.stride()[:2],
         *index_BT.stride(), u, tiles.slots, tiles.columns, tiles.depth, tiles.part),
        warps=tiles.warps,
    )  # fmt: skip
    of_head = (x.contiguous() for x in (head.norm_sq, head.error, head.rounding_sq))
    launch(
        _finish, (B, 1, 1), (sums, *of_head, terms, B, programs, tiles.slots * tiles.columns, _BLOCK), warps=1
    )  # fmt: skip
    return NormTerms.unstack(terms)


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


@triton.jit(do_not_specialize=["B", "S", "T", "programs"])
def _sum_tiles(
    a, g, h, index, sums, B, S, T, D, programs, a_row, a_next, g_row, g_next, g_word, h_row, h_next, index_row, index_next,
    U: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    row, program = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    # Neighbours gather the same numbers.
    across, parts = tl.cdiv(D, COLUMNS), tl.cdiv(S, PART)
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    part = program // across % parts
    slot = program // (across * parts) * SLOTS + tl.arange(0, SLOTS)
    first = part * PART
    end = min(first + PART, S)
    wide = column < D

    h += row * h_row + slot.to(tl.int64)[:, None] * h_next + column[None, :]
    h_inside = (slot < T)[:, None] & wide[None, :]
    h_TD = tl.load(h, mask=h_inside, other=0.0).to(tl.float64)
    h_sq = tl.sum(h_TD * h_TD, 1)
    used = h_sq != 0  # of NaN, too
    x = tl.load(index + row * index_row + slot.to(tl.int64) * index_next, mask=used, other=0)
    stop = tl.where(tl.max(used.to(tl.int32), 0) != 0, end, first)

    g += row * g_row + x[:, None] * g_word
    a += row * a_row + column[None, :]
    C = tl.zeros([SLOTS, COLUMNS], tl.float32)
    spread = tl.zeros([SLOTS, DEPTH], tl.float32)
    for s in range(first, stop, DEPTH):
        position = s + tl.arange(0, DEPTH)
        inside = position < end
        far = position.to(tl.int64)
        g_TS = tl.load(g + far[None, :] * g_next, mask=used[:, None] & inside[None, :], other=0.0)
        a_SD = tl.load(a + far[:, None] * a_next, mask=inside[:, None] & wide[None, :], other=0.0)
        C = tl.dot(g_TS, a_SD, C)
        a_32 = a_SD.to(tl.float32)
        length = tl.sqrt(tl.sum(a_32 * a_32, 1) + COLUMNS * _TINY)
        length = tl.where(length <= _LONGEST, length, float("inf"))
        spread += tl.abs(g_TS.to(tl.float32)) * length[None, :]

    # [Note: the certificate]
    inner = tl.sum(tl.sum(C.to(tl.float64) * tl.load(h, mask=h_inside, other=0.0).to(tl.float64), 1), 0)
    h_length = tl.sqrt(h_sq)
    h_length = tl.where(h_length <= _LONGEST, h_length, float("inf"))
    n = (end - first).to(tl.float64)
    lost = n * tl.full((), _TINY, tl.float64)
    lacking = 1 + 2 * _gamma(tl.full((), COLUMNS + DEPTH + PART // DEPTH + 16, tl.float64), _U32)
    W = (tl.sum(spread, 1).to(tl.float64) + lost) * lacking
    adding = 2 * _gamma((SLOTS * COLUMNS + programs + 64).to(tl.float64), _U64)
    relative = _gamma(n, U) + adding
    root = tl.sqrt(tl.full((), 1.01 * COLUMNS, tl.float64))
    error = tl.sum(h_length * (relative * W + lost * root), 0)

    out = sums + row * programs + program
    field = B.to(tl.int64) * programs
    tl.store(out, inner)
    tl.store(out + field, error)
    tl.store(out + 2 * field, tl.where(part == 0, tl.sum(h_sq, 0), 0.0))


@triton.jit(do_not_specialize=["B", "programs"])
def _finish(
    sums, head_norm, head_error, head_rounding, terms, B, programs, TILE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Of one row."""
    row = tl.program_id(0)
    own = sums + row.to(tl.int64) * programs
    field = B.to(tl.int64) * programs
    inner, error = _over_programs(own, programs, BLOCK), _over_programs(own + field, programs, BLOCK)
    square = _over_programs(own + 2 * field, programs, BLOCK)
    norm = tl.load(head_norm + row) + square + 2 * inner
    adding = _gamma((TILE + programs + 64).to(tl.float64), _U64)
    root = tl.sqrt(tl.load(head_rounding + row)) + tl.sqrt(square * tl.full((), _ROUNDING, tl.float64))
    tl.store(terms + row, tl.where(norm < 0, 0.0, norm))  # selection, not maximum, which would drop NaN
    tl.store(terms + B + row, tl.load(head_error + row) + square * adding + 2 * error)
    tl.store(terms + 2 * B + row, root * root)


@triton.jit
def _over_programs(field, programs, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, programs, BLOCK):
        program = first + tl.arange(0, BLOCK)
        total += tl.load(field + program, mask=program < programs, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _gamma(n, u: tl.constexpr):
    """`numerics.gamma`."""
    spread = n * tl.full((), u, tl.float64)
    return tl.where(spread < 0.5, spread / (1 - spread), float("inf"))
