"""How the rows' gradients of a parameter were measured: by which method, at what cost, and how much slack it left.

For people (`summary`), from the first microbatch; nothing here decides anything. The slack comes from the norms of the
rows, so it is not private.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import Tensor

from fsdp_dp.clipping import certified_norm, nominal_norm
from fsdp_dp.gradients import PerSampleGradient
from fsdp_dp.norm_terms import NormTerms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One parameter's gradients of a microbatch.

    Attributes:
        method: as the gradient names it.
        cost: of the norm, in products as large as the one that makes the parameter's own gradient.
        kept: bytes a row that are kept until the weights are known.
        terms: the norms.
    """

    method: str
    cost: float
    kept: int
    terms: NormTerms

    @staticmethod
    def of(gradient: PerSampleGradient) -> Measured:
        terms = gradient.norm_terms()
        rows = max(1, terms.norm_sq.numel())
        return Measured(method=gradient.method, cost=gradient.norm_cost, kept=_bytes(gradient) // rows, terms=terms)


def _bytes(gradient: PerSampleGradient) -> int:
    """What a gradient's tensors take up, whatever its form."""
    total = 0
    for field in dataclasses.fields(gradient):  # type: ignore[arg-type]
        value = getattr(gradient, field.name)
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif dataclasses.is_dataclass(value) and hasattr(value, "norm_terms"):
            total += _bytes(value)  # type: ignore[arg-type]
    return total


def inflation(measured: Iterable[Measured]) -> float | None:
    """By how much certified norms over these parameters exceed computed ones, the mean over rows; None without a norm."""
    terms = [m.terms for m in measured]
    if not terms:
        return None
    total = terms[0]
    for more in terms[1:]:
        total = total + more
    plain, certified = nominal_norm(total), certified_norm(total)
    usable = (plain > 0) & certified.isfinite()
    return float((certified[usable] / plain[usable] - 1).mean()) if bool(usable.any()) else None
