"""From norms to the weight of each row: the step that bounds what one row can do.

Rows whose norm is not finite, and padding rows, get weight zero and are dropped by selection.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fsdp_dp import kernels
from fsdp_dp.norm_terms import NormTerms, TermsOfGroups
from fsdp_dp.side_stream import to_device


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowWeights:
    """``weight_B`` multiplies the recorded gradients; ``keep_B`` says which rows take part; ``norm_B`` is reported.

    ``[B]``, or ``[K, B]`` of several groups.
    """

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
        norm_sq, kept = rows.norm_B.square(), rows.keep_B
        if norm_sq.ndim > 1:
            norm_sq, kept = (norm_sq[0], kept[0]) if len(kept) == 1 else (norm_sq.sum(0), kept.all(0))
        self.norm_sq_B.add_(norm_sq)
        self.dropped_B.logical_or_(~kept)


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


def abadi_weights(norm_B: Tensor, bound: float | Tensor) -> Tensor:
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


def automatic_weights(norm_B: Tensor, bound: float | Tensor, stability: float) -> Tensor:
    """``bound / (norm + stability)`` (AUTO-S: Bu, Wang, Zha, Karypis, arXiv 2206.07136, eq. 4), float64.

    **Formal guarantee.** ``weight_i * norm_i < bound`` for every row with a finite norm, after rounding down.
    """
    down = 1 - 2.0**-50
    return bound / (norm_B + stability) * down


def normalized_weights(norm_B: Tensor, bound: float | Tensor) -> Tensor:
    """``bound / norm`` (AUTO-V, ibid.), 0 for a row without a gradient, float64.

    **Formal guarantee.** ``weight_i * norm_i <= bound`` for every row with a finite norm, after rounding down.
    """
    return torch.where(norm_B > 0, automatic_weights(norm_B, bound, 0.0), 0.0)


def clip_weights(norm_B: Tensor, bound: float | Tensor, clip_function: str, stability: float) -> Tensor:
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
    terms: NormTerms | TermsOfGroups,
    mask_B: Tensor,
    *,
    bound: float | Sequence[float],
    loss_factor: float,
    numerics: str,
    dtype: torch.dtype,
    clip_function: str = "abadi",
    stability: float = 0.0,
    totals: RowTotals | None = None,
) -> RowWeights:
    """Weights for the recorded gradients of one microbatch.

    Args:
        terms: norms of the *recorded* per-sample gradients; the row's own gradient is ``loss_factor`` times that. Of one
            group ``[B]``, or of several ``[K, B]``, as are then the weights.
        mask_B: bool ``[B]``, False for padding.
        bound: sensitivity left for a row, in units of the row's own gradient; that of each of several groups.
        dtype: format of the weighted sum (float32 or float64).
        clip_function: "abadi", "automatic" (with ``stability``) or "normalized".
        totals: what these groups are added to.

    **Formal guarantee.** With ``numerics="certified"``, ``|weight_i * G_i| <= bound`` as summed, for every row and group.
    """
    if _has_kernel(mask_B, dtype):
        bounds = (bound,) if isinstance(bound, float | int) else tuple(bound)
        measured = terms if isinstance(terms, TermsOfGroups) else TermsOfGroups.of(terms)
        rows = _by_kernel(measured, mask_B, bounds, loss_factor, numerics, clip_function, stability, totals)
        return _of_one(rows) if isinstance(bound, float | int) else rows
    if isinstance(terms, TermsOfGroups):
        terms = terms.of_groups()
    limit: float | Tensor
    if isinstance(bound, float | int):
        limit = bound
    else:
        limit = bound[0] if len(bound) == 1 else _on_lines(tuple(bound), mask_B.device)
    norm_B = NORMS[numerics](terms) * loss_factor
    # The reported norm is of the same order whatever `numerics` is; it decides what is kept, before any min or max.
    keep_B = torch.isfinite(norm_B) & (norm_B <= LONGEST_ROW[dtype] * limit) & mask_B
    weight_B = clip_weights(norm_B, limit, clip_function, stability).clamp(max=MAX_WEIGHT[dtype])
    weight_B = torch.where(keep_B, weight_B * loss_factor, 0.0)
    rows = RowWeights(
        weight_B=round_down(weight_B, dtype),
        keep_B=keep_B,
        norm_B=nominal_norm(terms) * loss_factor,
    )
    if totals is not None:
        totals.add_(rows)
    return rows


@functools.lru_cache(maxsize=256)
def _on_lines(bounds: tuple[float, ...], device: torch.device) -> Tensor:
    return to_device(torch.tensor(bounds, dtype=torch.float64), device)[:, None]


def _of_one(rows: RowWeights) -> RowWeights:
    return RowWeights(weight_B=rows.weight_B[0], keep_B=rows.keep_B[0], norm_B=rows.norm_B[0])


def _has_kernel(mask_B: Tensor, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and kernels.available(mask_B.device)


def _by_kernel(
    terms: TermsOfGroups,
    mask_B: Tensor,
    bounds: Sequence[float],
    loss_factor: float,
    numerics: str,
    clip_function: str,
    stability: float,
    totals: RowTotals | None,
) -> RowWeights:
    """The same in one launch."""
    from fsdp_dp.kernels.row_weights import weigh

    weight_KB, keep_KB, norm_KB = weigh(
        terms.terms_n3B.contiguous(),
        terms.owners,
        mask_B,
        None if totals is None else (totals.norm_sq_B, totals.dropped_B),
        bounds=bounds,
        loss_factor=loss_factor,
        certified=numerics == "certified",
        clip_function=clip_function,
        stability=stability,
        most=MAX_WEIGHT[torch.float32],
        longest=LONGEST_ROW[torch.float32],
    )
    return RowWeights(weight_B=weight_KB, keep_B=keep_KB, norm_B=norm_KB)
