"""Convolution weights: ``G_i = sum_t g_it patch_t(a_i)^T``, an outer product over patches that are cut out when needed.

A 3 x 3 patch of every position is nine times the input, so patches are never kept: what is kept is what autograd had.
They are cut a few rows at a time, and of a large row a few lines at a time, so scratch memory is bounded.

Legend: B rows, G groups, T output positions, D elements of a group's patch, P outputs of a group.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fsdp_dp.columns import MAX_SCRATCH_ELEMENTS
from fsdp_dp.gradients import Materialized, OuterProduct, _norm_sq, _token_norms, outer_norm_cost, product_rounding
from fsdp_dp.norm_terms import NormTerms
from fsdp_dp.numerics import (
    accumulate_dtype,
    gamma,
    product,
    product_roundoff,
    underflow,
)
from fsdp_dp.planner import STORE_AT_MOST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a convolution cuts patches out of its input ``[b, C, *S]``.

    ``padding`` is in the order of ``F.pad``, last dimension first.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    padding_mode: str
    groups: int

    def padded(self, a: Tensor) -> Tensor:
        if not any(self.padding):
            return a
        return F.pad(a, self.padding, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def windows(self, padded: Tensor) -> Tensor:
        """All patches ``[b, C, *out, *kernel]``, as a view."""
        b, C, *sizes = padded.shape
        sb, sc, *steps = padded.stride()
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        out = [(size - span) // s + 1 for size, span, s in zip(sizes, spans, self.stride, strict=True)]
        strides = [step * s for step, s in zip(steps, self.stride, strict=True)]
        inner = [step * d for step, d in zip(steps, self.dilation, strict=True)]
        return padded.as_strided((b, C, *out, *self.kernel), (sb, sc, *strides, *inner))

    def patches(self, windows: Tensor) -> Tensor:
        """``[b, C, *out, *kernel]`` to ``[b G, T, D]``."""
        n = len(self.kernel)
        split = windows.unflatten(1, (self.groups, -1))
        order = (0, 1, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n))
        return split.permute(order).flatten(2 + n).flatten(2, 1 + n).flatten(0, 1)


@dataclasses.dataclass(frozen=True)
class PatchProduct:
    """The gradient ``[G P, C / G, *kernel]`` of a convolution's weight.

    ``a`` ``[B, C, *S]`` and ``g`` ``[B, G P, *out]`` are kept in the dtypes that autograd had.
    """

    a: Tensor
    g: Tensor
    geometry: Geometry

    @property
    def dtype(self) -> torch.dtype:
        return accumulate_dtype(torch.promote_types(self.a.dtype, self.g.dtype))

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        """``G, T, D, P``."""
        G = self.geometry.groups
        return G, self.g[0, 0].numel(), self.a.shape[1] // G * math.prod(self.geometry.kernel), self.g.shape[1] // G

    @property
    def uses_gram(self) -> bool:
        _, T, D, P = self._sizes
        return T * (D + P) < D * P

    @property
    def method(self) -> str:
        return "gram of patches" if self.uses_gram else "instantiate from patches"

    @property
    def norm_cost(self) -> float:
        return outer_norm_cost(*self._sizes[1:])

    def _pieces(self, rows: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Patches ``[b G, T', D]`` and output gradients ``[b G, T', P]`` of some rows, a few output lines at a time."""
        G, T, D, _ = self._sizes
        windows = self.geometry.windows(self.geometry.padded(self.a[rows]))
        lines = max(1, self.g.shape[2] * MAX_SCRATCH_ELEMENTS // max(1, G * T * D))
        for part, g in zip(windows.split(lines, 2), self.g[rows].split(lines, 2), strict=True):
            yield self.geometry.patches(part), g.flatten(2).unflatten(1, (G, -1)).mT.flatten(0, 1)

    def _rows(self, *, with_gradient: bool) -> Iterator[slice]:
        """So many rows at a time that their patches (and gradients) fit the scratch."""
        G, T, D, P = self._sizes
        step = max(1, MAX_SCRATCH_ELEMENTS // max(1, G * T * D, G * D * P if with_gradient else 0))
        return (slice(start, start + step) for start in range(0, len(self.a), step))

    def norm_terms(self) -> NormTerms:
        norms = self._gram_norms if self.uses_gram else self._instantiated_norms
        parts = [norms(rows).stack() for rows in self._rows(with_gradient=not self.uses_gram)]
        return NormTerms.unstack(torch.cat(parts, 1))

    def _gram_norms(self, rows: slice) -> NormTerms:
        """The groups' gradients are parts of one: their squared norms, and squared bounds, add up."""
        a, g = (torch.cat(parts, 1) for parts in zip(*self._pieces(rows), strict=True))
        terms = OuterProduct(a, g).norm_terms().stack()
        return NormTerms.unstack(terms.unflatten(1, (-1, self.geometry.groups)).sum(2))

    def _instantiated_norms(self, rows: slice) -> NormTerms:
        """As for a Linear (see `gradients`), with the products of all pieces summed; `S` is that of each group."""
        G, T, D, P = self._sizes
        gradient = torch.zeros((), dtype=self.dtype, device=self.a.device)
        S, pieces = torch.zeros((), dtype=torch.float64, device=self.a.device), 0
        for a, g in self._pieces(rows):
            gradient, pieces = gradient + product(g.mT, a), pieces + 1
            a_norm, g_norm = _token_norms(a, g)
            S = S + (a_norm * g_norm).sum(1)
        S_B = S.unflatten(0, (-1, G)).square().sum(1).sqrt()
        norm_sq, error = _norm_sq(gradient.unflatten(0, (-1, G)))
        terms, numel = T + pieces, G * D * P
        off = gamma(terms, product_roundoff(self.a, self.g)) * S_B + underflow(terms, gradient.dtype) * numel**0.5
        return NormTerms(
            norm_sq=norm_sq,
            error=2 * off * (norm_sq + error).sqrt() + off**2 + error,
            rounding_sq=(S_B * product_rounding(self.a, len(self.a), terms)) ** 2,
        )

    def weighted_sum(self, weight_B: Tensor, keep_B: Tensor) -> Tensor:
        G, _, D, P = self._sizes
        total = torch.zeros(G, P, D, dtype=self.dtype, device=self.a.device)
        for rows in self._rows(with_gradient=False):
            for a, g in self._pieces(rows):
                for group, out in enumerate(total):
                    out += OuterProduct(a[group::G], g[group::G]).weighted_sum(weight_B[rows], keep_B[rows])
        return self._shaped(total.flatten(0, 1))

    def dense(self) -> Tensor:
        parts = (
            functools.reduce(torch.add, (product(g.mT, a) for a, g in self._pieces(rows)))
            for rows in self._rows(with_gradient=True)
        )
        return self._shaped(torch.cat(list(parts)).unflatten(0, (-1, self.geometry.groups)).flatten(1, 2))

    def _shaped(self, gradient: Tensor) -> Tensor:
        return gradient.unflatten(-1, (-1, *self.geometry.kernel))

    def regroup(self, rows: int) -> Materialized:
        return Materialized(self.dense()).regroup(rows)

    def settle(self) -> PatchProduct | Materialized:
        G, _, D, P = self._sizes
        factors = sum(x[0].numel() * x.element_size() for x in (self.a, self.g))
        if self.uses_gram or G * D * P * self.dtype.itemsize > STORE_AT_MOST * factors:
            return self
        return Materialized(self.dense())
