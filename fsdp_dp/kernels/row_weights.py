"""The weights of a group's rows in one launch, where torch has fifty small ones: with a group a layer, these would be most.

In the step: `clipping.row_weights` comes here for float32 sums on a GPU; its torch lines are the reference. A program has
some rows. All of it is float64, correctly rounded operation by operation as in torch, but for what is fused to one rounding.
"""

# Triton's jit reads no annotations but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsdp_dp.kernels.launching import launch

_BLOCK = 128
_FUNCTIONS = {"abadi": 0, "automatic": 1, "normalized": 2}


def weigh(
    terms: tuple[Tensor, Tensor, Tensor],
    mask_B: Tensor,
    totals: tuple[Tensor, Tensor] | None,
    *,
    bound: float,
    loss_factor: float,
    certified: bool,
    clip_function: str,
    stability: float,
    most: float,
    longest: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``weight_B`` (float32), ``keep_B`` and ``norm_B`` (float64) of `clipping.RowWeights`.

    Args:
        terms: norm_sq, error, rounding_sq, each float64 ``[B]`` and contiguous.
        totals: ``norm_sq_B`` and ``dropped_B`` of `clipping.RowTotals`, to add to.
        most: no weight is larger; ``longest``: a row longer than so many times the bound is not kept.
    """
    B, device = len(mask_B), mask_B.device
    weight_B = torch.empty(B, dtype=torch.float32, device=device)
    keep_B = torch.empty(B, dtype=torch.bool, device=device)
    norm_B = torch.empty(B, dtype=torch.float64, device=device)
    numbers = (_bits(bound), _bits(loss_factor), _bits(stability))
    constants = (totals is not None, certified, _FUNCTIONS[clip_function], most, longest, _BLOCK)
    launch(
        _weigh, (triton.cdiv(B, _BLOCK), 1, 1),
        (*terms, mask_B, weight_B, keep_B, norm_B, *(totals or (norm_B, keep_B)), B, *numbers, *constants), warps=4,
    )  # fmt: skip
    return weight_B, keep_B, norm_B


def _bits(x: float) -> int:
    """Of a float64: as a number, Triton would hand it over in float32. Its sign bit makes it 64 bits, whatever it is."""
    return int.from_bytes(struct.pack("<d", -x), "little", signed=True)


@triton.jit(do_not_specialize=["B", "bound", "factor", "stability"])
def _weigh(
    norm_sq, error, rounding_sq, mask, weight, keep, norm, norm_sq_sum, dropped, B, bound, factor, stability,
    ADDS: tl.constexpr, CERTIFIED: tl.constexpr, FUNCTION: tl.constexpr,
    MOST: tl.constexpr, LONGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < B
    bound, factor, stability = _number(bound), _number(factor), _number(stability)
    square = tl.load(norm_sq + row, mask=inside, other=0.0)
    computed = tl.sqrt(tl.where(square < 0, 0.0, square)) * factor
    length = computed
    if CERTIFIED:
        within = tl.sqrt(square + tl.load(error + row, mask=inside, other=0.0))
        rounding = tl.sqrt(tl.load(rounding_sq + row, mask=inside, other=0.0))
        length = (within + rounding) * tl.full((), 1 + 2.0**-40, tl.float64) * factor
    # A comparison with NaN is false, and so is one of infinity with a number: such rows are not kept.
    kept = (length <= bound * tl.full((), LONGEST, tl.float64)) & (tl.load(mask + row, mask=inside, other=0) != 0)
    down = tl.full((), 1 - 2.0**-50, tl.float64)
    one = tl.full((), 1.0, tl.float64)
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
    tl.store(weight + row, tl.where(nearest.to(tl.float64) > w, below, nearest), mask=inside)
    tl.store(keep + row, kept, mask=inside)
    tl.store(norm + row, computed, mask=inside)
    if ADDS:
        total = tl.load(norm_sq_sum + row, mask=inside, other=0.0)
        tl.store(norm_sq_sum + row, total + computed * computed, mask=inside)
        before = tl.load(dropped + row, mask=inside, other=0) != 0
        tl.store(dropped + row, before | (kept == 0), mask=inside)


@triton.jit
def _number(bits):
    """The float64 that `_bits` was given."""
    return -bits.to(tl.float64, bitcast=True)
