"""Squared norms of per-sample gradients, and what rounding may hide of them: what forms of gradients are asked for first."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormTerms:
    """Squared norms of one or more parameters' per-sample gradients, and what rounding may hide. All float64 ``[B]``.

    ``norm_sq`` is the computed value; the true one is at most ``norm_sq + error`` (both may be summed over
    parameters). ``rounding_sq`` is the squared bound on ``|weighted_sum's term of row i / w_i - G_i|``.
    """

    norm_sq: Tensor
    error: Tensor
    rounding_sq: Tensor

    def __add__(self, other: NormTerms) -> NormTerms:
        return NormTerms(
            norm_sq=self.norm_sq + other.norm_sq,
            error=self.error + other.error,
            rounding_sq=self.rounding_sq + other.rounding_sq,
        )

    def stack(self) -> Tensor:
        """``[3, B]``, the form in which terms travel between ranks."""
        return torch.stack([self.norm_sq, self.error, self.rounding_sq])

    @staticmethod
    def unstack(stacked: Tensor) -> NormTerms:
        return NormTerms(norm_sq=stacked[0], error=stacked[1], rounding_sq=stacked[2])

    @staticmethod
    def zeros(rows: int, device: torch.device) -> NormTerms:
        return NormTerms.unstack(torch.zeros(3, rows, dtype=torch.float64, device=device))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TermsOfGroups:
    """Terms of whatever was measured by itself, ``terms_n3B`` float64, and which of some groups each of the n belongs to."""

    terms_n3B: Tensor
    owners: tuple[int, ...]
    groups: int

    def of_groups(self) -> NormTerms:
        """Those of every group, ``[K, B]`` each."""
        whole = self.terms_n3B
        if self.groups == 1:
            return NormTerms.unstack((whole[0] if whole.shape[0] == 1 else whole.sum(0))[:, None])
        if self.owners == tuple(range(self.groups)):
            return NormTerms.unstack(whole.transpose(0, 1))
        entries = whole.unbind()
        none = torch.zeros_like(whole[0]) if set(range(self.groups)) - set(self.owners) else None
        sums = []
        for group in range(self.groups):
            own = [x for x, owner in zip(entries, self.owners, strict=True) if owner == group]
            sums.append(none if not own else own[0] if len(own) == 1 else torch.stack(own).sum(0))
        return NormTerms.unstack(torch.stack(sums, 1))  # type: ignore[arg-type]

    @staticmethod
    def of(terms: NormTerms) -> TermsOfGroups:
        """What is known of groups ``[K, B]``, or of one ``[B]``."""
        stacked = torch.stack([terms.norm_sq, terms.error, terms.rounding_sq], -2)
        terms_n3B = stacked if stacked.ndim == 3 else stacked[None]
        return TermsOfGroups(terms_n3B=terms_n3B, owners=tuple(range(len(terms_n3B))), groups=len(terms_n3B))
