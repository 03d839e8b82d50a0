"""From norms to the weight of each row: the step that bounds what one row can do.

Rows whose norm is not finite, and padding rows, get weight zero and are dropped by selection.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fsdp_dp import kernels
from fsdp_dp.gradients import NormTerms


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowWeights:
    """``weight_B`` multiplies the recorded gradients; ``keep_B`` says which rows take part; ``norm_B`` is reported."""

    weight_B: Tensor
    keep_B: Tensor
    norm_B: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowTotals:
    """Over clipping groups: ``norm_sq_B`` adds up reported norms, ``dropped_B`` says which rows took no part in some."""

    norm_sq_B: Tensor
    dropped_B: Tensor

    @staticmethod
    def zeros(mask_B: Tensor) -> RowTotals:
        """For the rows of a mask."""
        return RowTotals(norm_sq_B=torch.zeros_like(mask_B, dtype=torch.float64), dropped_B=torch.zeros_like(mask_B))

    def add_(self, rows: RowWeights) -> None:
        self.norm_sq_B.add_(rows.norm_B.square())
        self.dropped_B.logical_or_(~rows.keep_B)


def certified_norm(terms: NormTerms) -> Tensor:
    """``n_i + e_i`` ``[B]`` float64: no gradient of row i, as it will be rounded in the sum, is longer than this.

    The error of the computed square is added under the root; the rounding of the weighted sum moves the summed
    vector itself, so it is added outside (triangle inequality). The last factor covers the float64 arithmetic on the
    terms: sums over up to 2^12 parameters and ranks, roots, and the products and quotients of `row_weights`.
    """
    return ((terms.norm_sq + terms.error).sqrt() + terms.rounding_sq.sqrt()) * (1 + 2.0**-40)


def nominal_norm(terms: NormTerms) -> Tensor:
    """The computed norm, as the field uses it: an estimate, not a bound."""
    return terms.norm_sq.clamp(min=0).sqrt()


NORMS = {"certified": certified_norm, "nominal": nominal_norm}


def abadi_weights(norm_B: Tensor, bound: float) -> Tensor:
    """``min(1, bound / norm)`` (Abadi et al., arXiv 1607.00133, algorithm 1), float64.

    **Formal guarantee.** ``weight_i * norm_i <= bound`` for every row with a finite norm, after rounding down.
    """
    down = 1 - 2.0**-50
    return torch.where(norm_B > bound, bound / norm_B * down, 1.0)


MAX_WEIGHT = {torch.float64: 2.0**63, torch.float32: 2.0**40}
"""Rows shorter than the bound by more than this are scaled up by no more."""

LONGEST_ROW = {torch.float64: 2.0**1000, torch.float32: 2.0**80}
"""A row longer than this many times its bound counts as non-finite. With MAX_WEIGHT it keeps quotients of two weights well
within float32: `kernels.weighted_outer` multiplies its sums by them, and one that vanished would take other rows along."""


def automatic_weights(norm_B: Tensor, bound: float, stability: float) -> Tensor:
    """``bound / (norm + stability)`` (AUTO-S: Bu, Wang, Zha, Karypis, arXiv 2206.07136, eq. 4), float64.

    **Formal guarantee.** ``weight_i * norm_i < bound`` for every row with a finite norm, after rounding down.
    """
    down = 1 - 2.0**-50
    return bound / (norm_B + stability) * down


def normalized_weights(norm_B: Tensor, bound: float) -> Tensor:
    """``bound / norm`` (AUTO-V, ibid.), 0 for a row without a gradient, float64.

    **Formal guarantee.** ``weight_i * norm_i <= bound`` for every row with a finite norm, after rounding down.
    """
    return torch.where(norm_B > 0, automatic_weights(norm_B, bound, 0.0), 0.0)


def clip_weights(norm_B: Tensor, bound: float, clip_function: str, stability: float) -> Tensor:
    """The weights of one of the clip functions by its name in the configuration."""
    if clip_function == "abadi":
        return abadi_weights(norm_B, bound)
    return (
        automatic_weights(norm_B, bound, stability)
        if clip_function == "automatic"
        else normalized_weights(norm_B, bound)
    )


def round_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest value of ``dtype`` that is at most ``x`` (``x >= 0``)."""
    rounded = x.to(dtype)
    below = torch.nextafter(rounded, torch.zeros_like(rounded))
    return torch.where(rounded.to(x.dtype) > x, below, rounded)


def row_weights(
    terms: NormTerms,
    mask_B: Tensor,
    *,
    bound: float,
    loss_factor: float,
    numerics: str,
    dtype: torch.dtype,
    clip_function: str = "abadi",
    stability: float = 0.0,
    totals: RowTotals | None = None,
) -> RowWeights:
    """Weights for the recorded gradients of one microbatch.

    Args:
        terms: norms of the *recorded* per-sample gradients; the row's own gradient is ``loss_factor`` times that.
        mask_B: bool ``[B]``, False for padding.
        bound: sensitivity left for a row, in units of the row's own gradient.
        dtype: format of the weighted sum (float32 or float64).
        clip_function: "abadi", "automatic" (with ``stability``) or "normalized".
        totals: what this group is added to.

    **Formal guarantee.** With ``numerics="certified"``, ``|weight_i * G_i| <= bound`` as summed, for every row.
    """
    if _has_kernel(mask_B, dtype):
        return _by_kernel(terms, mask_B, bound, loss_factor, numerics, clip_function, stability, totals)
    norm_B = NORMS[numerics](terms) * loss_factor
    # The reported norm is of the same order whatever `numerics` is; it decides what is kept, before any min or max.
    keep_B = torch.isfinite(norm_B) & (norm_B <= LONGEST_ROW[dtype] * bound) & mask_B
    weight_B = clip_weights(norm_B, bound, clip_function, stability).clamp(max=MAX_WEIGHT[dtype])
    weight_B = torch.where(keep_B, weight_B * loss_factor, 0.0)
    rows = RowWeights(
        weight_B=round_down(weight_B, dtype),
        keep_B=keep_B,
        norm_B=nominal_norm(terms) * loss_factor,
    )
    if totals is not None:
        totals.add_(rows)
    return rows


def _has_kernel(mask_B: Tensor, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and kernels.available(mask_B.device)


def _by_kernel(
    terms: NormTerms,
    mask_B: Tensor,
    bound: float,
    loss_factor: float,
    numerics: str,
    clip_function: str,
    stability: float,
    totals: RowTotals | None,
) -> RowWeights:
    """The same in one launch."""
    from fsdp_dp.kernels.row_weights import weigh

    weight_B, keep_B, norm_B = weigh(
        (terms.norm_sq.contiguous(), terms.error.contiguous(), terms.rounding_sq.contiguous()),
        mask_B,
        None if totals is None else (totals.norm_sq_B, totals.dropped_B),
        bound=bound,
        loss_factor=loss_factor,
        certified=numerics == "certified",
        clip_function=clip_function,
        stability=stability,
        most=MAX_WEIGHT[torch.float32],
        longest=LONGEST_ROW[torch.float32],
    )
    return RowWeights(weight_B=weight_B, keep_B=keep_B, norm_B=norm_B)
