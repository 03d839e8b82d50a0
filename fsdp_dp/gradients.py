"""Per-sample gradients in factored form: the one abstraction that layers produce and clipping consumes.

A backward pass gives, for each parameter ``W`` and each row ``i`` of the microbatch, a gradient ``G_i``. It is almost
never stored. What is stored is one of

* `OuterProduct`   ``G_i = sum_t g_it a_it^T``     (Linear weights; book-keeping, arXiv 2210.00038, section 3)
* `IndexedRows`    ``G_i[v] = sum_{t: x_it = v} h_it``   (Embedding weights)
* `Materialized`   ``G_i`` itself, where that is small (biases, norm layers)
* `Formed`         ``G_i`` of a Linear, formed and measured by one kernel, perhaps rounded
* `TiedSum`        an outer product plus indexed rows  (an embedding that is also the output head)

and each can answer the three questions of a private step: how long is every row (`norm_terms`), what is the weighted
sum ``sum_i w_i G_i`` (`weighted_sum`), and, as a last resort, what is the gradient of every row (`dense`).

[Note: tensors] shape suffixes used from here on
    B rows (samples) of the microbatch     T positions of a row       D inputs    P outputs    V vocabulary
    ``a_BTD``  input activations of a layer          ``g_BTP``  gradients of the loss with respect to its output
    ``keep_B``  False for padding and non-finite rows  ``weight_B``  clip factor times loss factor
All sums are float32 (float64 for float64 models); norms are summed in float64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fsdp_dp import columns, planner
from fsdp_dp.columns import is_few, portions, side_by_side
from fsdp_dp.kernels import outer as fused
from fsdp_dp.kernels import table_rows, tied
from fsdp_dp.norm_terms import NormTerms
from fsdp_dp.numerics import (
    SPLIT_ROUNDOFF,
    accumulate_dtype,
    gamma,
    on_tensor_cores,
    product,
    product_roundoff,
    split_bfloat16,
    underflow,
)

NORM_PIECE = 256

GRAM_BLOCK = 1024
"""Width contracted at a time in a Gram matrix: rounding grows with this, not with the width of the layer."""

LONGEST_TOKEN = 2.0**63
"""A row with a longer token counts as non-finite: beside it, underflow of the other factor could hide something."""


class PerSampleGradient(Protocol):
    """The gradient of one parameter for every row of a microbatch, in whatever form is cheapest."""

    @property
    def method(self) -> str:
        """How it is measured, for people."""
        ...

    @property
    def norm_cost(self) -> float:
        """Of the norm, in products as large as the one that makes the parameter's own gradient; for people."""
        ...

    def norm_terms(self) -> NormTerms: ...

    def weighted_sum(self, weight_B: Tensor, keep_B: Tensor) -> Tensor: ...

    def dense(self) -> Tensor: ...

    def regroup(self, rows: int) -> PerSampleGradient:
        """As many rows as given, each the sum of equally many consecutive ones."""
        ...

    def settle(self) -> PerSampleGradient:
        """The form to keep until the weights are known."""
        ...


def _rows_per_chunk(elements_per_row: int) -> int:
    return max(1, columns.MAX_SCRATCH_ELEMENTS // max(1, elements_per_row))


def _norm_sq(*values: Tensor) -> tuple[Tensor, Tensor]:
    """Squared 2-norm of every row over all ``values`` ``[B, ...]``, and a bound on its error; both float64 ``[B]``.

    One pass in the tensors' own format over pieces of NORM_PIECE elements; the pieces are added in float64. All terms
    are positive, so `gamma` of a piece is the error of the whole.
    """
    flat = [x.flatten(1) for x in values if not is_few(x)]
    small = {str(number): x for number, x in enumerate(values) if is_few(x)}
    flat += [side_by_side(list(part.values())) for part in portions(small)]
    pieces = torch.cat([norms for x in flat for norms in _norms_of_pieces(x)], 1)
    norm_sq = torch.linalg.vector_norm(pieces, dim=1, dtype=torch.float64).square()
    dtype, terms = flat[0].dtype, sum(x.shape[1] for x in flat)
    relative = 2 * gamma(NORM_PIECE + 4, dtype) + gamma(pieces.shape[1] + 4, torch.float64)
    return norm_sq, norm_sq * relative + underflow(terms, dtype)


def _norms_of_pieces(x_BN: Tensor) -> list[Tensor]:
    whole = x_BN.shape[1] // NORM_PIECE * NORM_PIECE
    pieces = [torch.linalg.vector_norm(x_BN[:, :whole].unflatten(1, (-1, NORM_PIECE)), dim=2)] if whole else []
    rest = [torch.linalg.vector_norm(x_BN[:, whole:], dim=1, keepdim=True)] if whole < x_BN.shape[1] else []
    return pieces + rest


def _kept(x: Tensor, keep_B: Tensor) -> Tensor:
    """Zero the dropped rows by selection: 0 * NaN would be NaN."""
    return torch.where(keep_B.view(-1, *[1] * (x.ndim - 1)), x, 0)


@dataclasses.dataclass(frozen=True)
class Materialized:
    """``G_i`` stored as computed, ``value`` ``[B, *shape]`` float32 or float64. What is summed is what was measured."""

    value: Tensor
    method: ClassVar[str] = "store"
    norm_cost: ClassVar[float] = 0.0

    def norm_terms(self) -> NormTerms:
        return stored_norm_terms([self.value])

    def weighted_sum(self, weight_B: Tensor, keep_B: Tensor) -> Tensor:
        kept = _kept(self.value, keep_B)
        return (weight_B.to(kept.dtype) @ kept.flatten(1)).view(self.value.shape[1:])

    def dense(self) -> Tensor:
        return self.value

    def regroup(self, rows: int) -> Materialized:
        return Materialized(self.value.unflatten(0, (rows, -1)).sum(1))

    def settle(self) -> Materialized:
        return self


@dataclasses.dataclass(frozen=True)
class Formed:
    """``G_i`` of a Linear as a kernel stored it, ``value_BPD``, with the ``squares_BNF`` that it left of just that."""

    value_BPD: Tensor
    squares_BNF: Tensor
    norm_cost: ClassVar[float] = 0.0

    @property
    def method(self) -> str:
        return "store" if self.value_BPD.dtype == torch.float32 else "round"

    def norm_terms(self) -> NormTerms:
        return NormTerms.unstack(fused.stored_norms([(self.value_BPD, self.squares_BNF)])[0])

    def weighted_sum(self, weight_B: Tensor, keep_B: Tensor) -> Tensor:
        return self.sum_into(_kept(weight_B, keep_B))

    def sum_into(
        self, weight_B: Tensor, out: Tensor | None = None, onto: Tensor | None = None, part: int = 0
    ) -> Tensor:
        """Of rows whose weight is not zero, in ``out`` if there is one; ``onto`` is added to its ``part``-th slice."""
        return fused.weighted_rows(self.value_BPD, weight_B.float(), out, onto, part)

    def dense(self) -> Tensor:
        return self.value_BPD.float()

    def regroup(self, rows: int) -> Materialized:
        return Materialized(self.dense()).regroup(rows)

    def settle(self) -> Formed:
        return self


def stored_norm_terms(values: Sequence[Tensor]) -> NormTerms:
    """Norms over several stored gradients of one dtype, together."""
    norm_sq, error = _norm_sq(*values)
    # The weight cast to this format, the product and, in a tied table, one addition; one to spare.
    return NormTerms(norm_sq=norm_sq, error=error, rounding_sq=norm_sq * gamma(4, values[0].dtype) ** 2)


@dataclasses.dataclass(frozen=True)
class OuterProduct:
    """``G_i = sum_t g_it a_it^T`` ``[P, D]``, kept as ``a_BTD`` and ``g_BTP`` in the dtypes that autograd had."""

    a_BTD: Tensor
    g_BTP: Tensor

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        return accumulate_dtype(torch.promote_types(self.a_BTD.dtype, self.g_BTP.dtype))

    @functools.cached_property
    def is_fused(self) -> bool:
        """Whether the kernels of `kernels.outer` take these factors: padded ones for Gram matrices alone."""
        return fused.usable(self.a_BTD, self.g_BTP) or (
            fused.usable_padded(self.a_BTD, self.g_BTP) and self._method(fused=True) == "gram"
        )

    @functools.cached_property
    def method(self) -> planner.Method:  # type: ignore[override]
        """How the rows are measured (see `planner`)."""
        return self._method(fused=self.is_fused)

    def _method(self, *, fused: bool, rounds: bool = False) -> planner.Method:
        a, g = self.a_BTD, self.g_BTP
        narrower = min(a.element_size(), g.element_size())
        return planner.method(*a.shape[1:], g.shape[2], narrower, self.dtype.itemsize, fused=fused, rounds=rounds)

    @property
    def plan(self) -> dict[str, Any]:
        """What shapes and formats decide."""
        return {"dtype": self.dtype, "is_fused": self.is_fused, "method": self.method}

    def adopt(self, plan: Mapping[str, Any]) -> None:
        """Take over the plan of an outer product that has the same shapes and formats."""
        vars(self).update(plan)

    @property
    def uses_gram(self) -> bool:
        """Whether two T x T Gram matrices are cheaper than the P x D gradient of a row."""
        return self.method == "gram"

    @property
    def in_fused_gram(self) -> bool:
        """Whether one launch measures this and other layers that share the input."""
        return self.is_fused and self.uses_gram

    @property
    def norm_cost(self) -> float:
        return outer_norm_cost(self.a_BTD.shape[1], self.a_BTD.shape[2], self.g_BTP.shape[2])

    def rounded(self) -> PerSampleGradient:
        """`settle`, where the weights will be known soon: ``G_i`` rounded as the factors are, if that is cheapest.

        However few rows there are: there may be as many as were drawn, and one must not decide how the others are rounded.
        """
        a, g = self.a_BTD, self.g_BTP
        rounds = a.dtype == torch.bfloat16 and fused.usable(a, g) and self._method(fused=True, rounds=True) == "round"
        return Formed(*fused.stored_rows(a, g, a.dtype)) if rounds else self.settle()

    def settle(self) -> PerSampleGradient:
        """``G_i`` itself where it is what the norm needs and takes little more room than its factors, else unchanged."""
        if self.method != "store":
            return self
        if self.is_fused and fused.forms_well(self.a_BTD, self.g_BTP):
            return Formed(*fused.stored_rows(self.a_BTD, self.g_BTP, torch.float32))
        return Materialized(self.dense())

    def norm_terms(self) -> NormTerms:
        if self.in_fused_gram:
            return _fused_norm_terms([self])
        if self.is_fused:
            return NormTerms.unstack(fused.instantiated_norms([(self.a_BTD, self.g_BTP)])[0])
        T, D, P = *self.a_BTD.shape[1:], self.g_BTP.shape[2]
        step = _rows_per_chunk(T * T * 4 if self.uses_gram else D * P)
        norms = _gram_norms if self.uses_gram else _instantiated_norms
        parts = [norms(a, g).stack() for a, g in zip(self.a_BTD.split(step), self.g_BTP.split(step), strict=True)]
        return NormTerms.unstack(torch.cat(parts, dim=1))

    def weighted_sum(self, weight_B: Tensor, keep_B: Tensor) -> Tensor:
        if self.is_fused and weight_B.dtype == self.dtype:
            return fused.weighted_outer(self.a_BTD, self.g_BTP, _kept(weight_B, keep_B))
        a = _kept(self.a_BTD, keep_B).flatten(0, 1)
        scaled = (_kept(self.g_BTP, keep_B) * weight_B.to(self.dtype)[:, None, None]).flatten(0, 1)
        if self.is_fused or not on_tensor_cores(a):  # the kernels' norms leave no room for a factor in two parts
            return product(scaled.T, a)
        high, low = split_bfloat16(scaled)
        return product(high.T, a).add_(product(low.T, a))

    def dense(self) -> Tensor:
        return product(self.g_BTP.mT, self.a_BTD)

    def regroup(self, rows: int) -> OuterProduct:
        a, g = (x.reshape(rows, -1, x.shape[2]) for x in (self.a_BTD, self.g_BTP))
        return OuterProduct(a, g)


def settled(gradient: PerSampleGradient, *, soon: bool) -> PerSampleGradient:
    """The form to keep until the weights are known; ``soon``: before backward leaves the parameter's block."""
    return gradient.rounded() if soon and type(gradient) is OuterProduct else gradient.settle()


def outer_norm_cost(T: int, D: int, P: int) -> float:
    """Of two Gram matrices, or of the gradient itself where that is cheaper, in products of T x D and T x P."""
    return min(1.0, T * (D + P) / (D * P))


def _fused_norm_terms(outers: Sequence[OuterProduct]) -> NormTerms:
    """The sum of their terms; layers that were given the same tensor share its Gram matrix."""
    norms = fused.GhostNorms(outers[0].a_BTD.shape[0], outers[0].a_BTD.device)
    add_sharing_inputs(norms, outers)
    return NormTerms.unstack(norms.terms().sum(0))


def add_sharing_inputs(
    norms: fused.GhostNorms, outers: Sequence[OuterProduct], owners: Sequence[int] | None = None
) -> None:
    inputs: dict[tuple[Any, ...], tuple[Tensor, list[Tensor], list[int]]] = {}
    for number, outer in enumerate(outers):
        a = outer.a_BTD
        place = (a.untyped_storage()._cdata, a.storage_offset())  # not data_ptr: a plan's tensors have none
        _, gs, whose = inputs.setdefault((*place, *a.shape, *a.stride()), (a, [], []))
        gs.append(outer.g_BTP)
        whose.append(0 if owners is None else owners[number])
    norms.add([(a, gs) for a, gs, _ in inputs.values()], [whose for *_, whose in inputs.values()])


def _token_norms(a_BTD: Tensor, g_BTP: Tensor) -> tuple[Tensor, Tensor]:
    """``|a_t|`` and ``|g_t|`` ``[B, T]`` float64, rounded up enough to stay bounds; infinite beyond LONGEST_TOKEN."""
    return _token_norm(a_BTD), _token_norm(g_BTP)


def _token_norm(x_BTC: Tensor) -> Tensor:
    width, dtype = x_BTC.shape[2], accumulate_dtype(x_BTC.dtype)
    norm_BT = torch.linalg.vector_norm(x_BTC, dim=2, dtype=dtype).double() * (1 + gamma(width + 4, dtype))
    norm_BT += underflow(width, dtype) ** 0.5
    return torch.where(norm_BT > LONGEST_TOKEN, torch.inf, norm_BT)


def _gram(x_BTC: Tensor) -> tuple[Tensor, float]:
    """``x x^T`` ``[B, T, T]`` float64, summed over blocks of the width, and its error relative to ``|x_t||x_s|``.

    Cauchy-Schwarz over the blocks: the error of one block's products, and that of a float64 sum over blocks.
    """
    blocks = x_BTC.split(GRAM_BLOCK, dim=2)
    gram = functools.reduce(Tensor.add_, (product(b, b.mT).double() for b in blocks))
    return gram, gamma(blocks[0].shape[2], product_roundoff(x_BTC)) + gamma(len(blocks), torch.float64)


def _product_rounding(S_B: Tensor, a_BTD: Tensor) -> Tensor:
    return product_rounding(a_BTD, *a_BTD.shape[:2]) * S_B


def product_rounding(factor: Tensor, rows: int, terms: int) -> float:
    """Rounding of ``sum_t (w g_t) a_t^T``, relative to S: the scaled factor is rounded (or split in two), products summed.

    The kernel rounds 2 B + 2 times more in float32 instead of splitting: its weights are quotients of rows' weights.
    """
    weighting = SPLIT_ROUNDOFF + gamma(2 * rows + 4, torch.float32) if on_tensor_cores(factor) else 0.0
    return 1.01 * weighting + 1.01 * gamma(terms + 4, product_roundoff(factor))


def _instantiated_norms(a_BTD: Tensor, g_BTP: Tensor) -> NormTerms:
    """Norms from the gradient of each row, formed and dropped.

    Entry-wise ``|G^ - G| <= gamma(T) sum_t |g_t| |a_t|``, so in norm ``|G^ - G| <= gamma(T) S`` with
    ``S = sum_t |a_t| |g_t|``; then ``|G|^2 <= (|G^| + gamma(T) S)^2``.
    """
    T, numel = a_BTD.shape[1], a_BTD.shape[2] * g_BTP.shape[2]
    G = product(g_BTP.mT, a_BTD)
    norm_sq, error = _norm_sq(G)
    a_norm, g_norm = _token_norms(a_BTD, g_BTP)
    S_B = (a_norm * g_norm).sum(1)
    off = gamma(T, product_roundoff(a_BTD, g_BTP)) * S_B + underflow(T, G.dtype) * numel**0.5
    return NormTerms(
        norm_sq=norm_sq,
        error=2 * off * (norm_sq + error).sqrt() + off**2 + error,
        rounding_sq=_product_rounding(S_B, a_BTD) ** 2,
    )


def _gram_norms(a_BTD: Tensor, g_BTP: Tensor) -> NormTerms:
    """The ghost norm ``sum_{t,s} (a_t.a_s)(g_t.g_s)`` (arXiv 2210.00038, eq. 2), products summed in float64.

    With ``M = a a^T``, ``N = g g^T`` and their computed values, ``|M^ - M| <= gamma(D) |a_t||a_s|`` and likewise for
    N, hence the error ``sum_ts gamma(D) |a_t||a_s||N^| + gamma(P) |g_t||g_s||M^| + 3 gamma(D) gamma(P) S^2``, and the
    float64 sum over T^2 terms adds ``gamma(T^2) S^2``. The weight ``|N^|`` (not ``|g_t||g_s|``) keeps it small for
    tokens that are nearly orthogonal. Under cancellation the computed value may be negative: clamped, error kept.
    """
    T, D, P = *a_BTD.shape[1:], g_BTP.shape[2]
    (M, off_M), (N, off_N) = _gram(a_BTD), _gram(g_BTP)
    a_norm, g_norm = _token_norms(a_BTD, g_BTP)
    S_B = (a_norm * g_norm).sum(1)
    on_M = (N.abs() @ a_norm[..., None]).squeeze(2).mul(a_norm).sum(1)
    on_N = (M.abs() @ g_norm[..., None]).squeeze(2).mul(g_norm).sum(1)
    own = gamma(T * T + 2 * T, torch.float64) + 3 * off_M * off_N
    lost_M, lost_N = (underflow(width, torch.float32) for width in (D, P))
    lost = 2 * (lost_M * g_norm.sum(1) ** 2 + lost_N * a_norm.sum(1) ** 2) + lost_M * lost_N * T**2
    return NormTerms(
        norm_sq=(M * N).sum((1, 2)).clamp(min=0),
        error=off_M * on_M + off_N * on_N + own * S_B**2 + lost,
        rounding_sq=_product_rounding(S_B, a_BTD) ** 2,
    )


@dataclasses.dataclass(frozen=True)
class IndexedRows:
    """``G_i[index_it] = value_it`` ``[V, P]``: the few rows of an embedding that a sample touches.

    Within a sample the indices of non-zero values are distinct (`compress` sees to it), so the norm is that of
    ``value_BTP`` and nothing is hidden by rounding.
    """

    index_BT: Tensor
    value_BTP: Tensor
    vocabulary: int
    method: ClassVar[str] = "rows"
    norm_cost: ClassVar[float] = 0.0

    @staticmethod
    def compress(index_BT: Tensor, g_BTP: Tensor, vocabulary: int) -> IndexedRows:
        """Add up the gradients of equal indices of a row; slots left over hold index 0 and value 0."""
        if table_rows.compressible(index_BT, g_BTP):
            return IndexedRows(*table_rows.compress(index_BT, g_BTP), vocabulary)
        B, T, P = g_BTP.shape
        sorted_index, order = index_BT.sort(dim=1, stable=True)
        new = torch.ones_like(sorted_index, dtype=torch.bool)
        new[:, 1:] = sorted_index[:, 1:] != sorted_index[:, :-1]
        slot_sorted = new.cumsum(1) - 1
        slot_BT = torch.empty_like(slot_sorted).scatter_(1, order, slot_sorted)
        flat = slot_BT + T * torch.arange(B, device=slot_BT.device)[:, None]
        g = g_BTP.to(accumulate_dtype(g_BTP.dtype))
        value = g.new_zeros(B * T, P).index_add_(0, flat.flatten(), g.reshape(B * T, P))
        index = torch.zeros_like(slot_BT).scatter_(1, slot_BT, index_BT)
        return IndexedRows(index, value.view(B, T, P), vocabulary)

    def norm_terms(self) -> NormTerms:
        return Materialized(self.value_BTP).norm_terms()

    def plus(self, dense: Tensor) -> Tensor:
        """The sum with a gradient that is stored for every row, ``dense`` ``[B, V, P]``."""
        return dense.scatter_add(1, self.index_BT[..., None].expand_as(self.value_BTP), self.value_BTP)

    @property
    def is_fused(self) -> bool:
        """Whether `sum_into` takes them."""
        return table_rows.summable(self.value_BTP)

    def sum_into(
        self, weight_B: Tensor, out: Tensor | None = None, onto: Tensor | None = None, part: int = 0
    ) -> Tensor:
        """As `Formed.sum_into`."""
        if out is None:
            out = self.value_BTP.new_zeros(self.vocabulary, self.value_BTP.shape[2])
        else:
            out.zero_()
        if onto is not None:
            out[part].copy_(onto)
        table_rows.weighted_sum(self.index_BT, self.value_BTP.contiguous(), weight_B.float(), out)
        return out

    def weighted_sum(self, weight_B: Tensor, keep_B: Tensor) -> Tensor:
        if self.is_fused:
            return self.sum_into(_kept(weight_B, keep_B))
        scaled = _kept(self.value_BTP * weight_B.to(self.value_BTP.dtype)[:, None, None], keep_B)
        out = scaled.new_zeros(self.vocabulary, scaled.shape[2])
        return out.index_add_(0, self.index_BT.flatten(), scaled.flatten(0, 1))

    def dense(self) -> Tensor:
        B, _, P = self.value_BTP.shape
        return self.plus(self.value_BTP.new_zeros(B, self.vocabulary, P))

    def regroup(self, rows: int) -> IndexedRows:
        index, value = self.index_BT.reshape(rows, -1), self.value_BTP.reshape(rows, -1, self.value_BTP.shape[2])
        return IndexedRows.compress(index, value, self.vocabulary)

    def settle(self) -> IndexedRows:
        return self


@dataclasses.dataclass(frozen=True)
class TiedSum:
    """One parameter used as a Linear weight ``[V, D]`` and as an embedding table: the sum of both gradients."""

    outer: OuterProduct
    rows: IndexedRows

    @property
    def method(self) -> str:
        return f"{self.outer.method} + rows"

    @property
    def norm_cost(self) -> float:
        return self.outer.norm_cost + self.rows.index_BT.shape[1] / self.rows.vocabulary

    @property
    def is_fused(self) -> bool:
        """Whether the kernels of `kernels.tied` take all but the norm of the outer product."""
        return tied.usable(self.outer.a_BTD, self.outer.g_BTP, self.rows.value_BTP)

    def norm_terms(self) -> NormTerms:
        """``|X + Y|^2 = |X|^2 + |Y|^2 + 2 <X, Y>``; leaving out the last term breaks the bound (DESIGN section 4)."""
        x = self.outer.norm_terms()
        if self.is_fused:
            return tied.norm_terms(self.outer.a_BTD, self.outer.g_BTP, self.rows.value_BTP, self.rows.index_BT, x)
        y = self.rows.norm_terms()
        cross, cross_error = self._inner_product()
        return NormTerms(
            norm_sq=(x.norm_sq + y.norm_sq + 2 * cross).clamp(min=0),
            error=x.error + y.error + 2 * cross_error,
            rounding_sq=(x.rounding_sq.sqrt() + y.rounding_sq.sqrt()) ** 2,
        )

    def _inner_product(self) -> tuple[Tensor, Tensor]:
        """``<X, Y>_i = sum_{s,t} g_is[x_it] (a_is . h_it)`` and its error bound, both ``[B]`` float64."""
        parts = [
            _tied_inner_product(a, g, h, index)
            for a, g, h, index in zip(
                *(
                    x.split(_rows_per_chunk(4 * self.outer.a_BTD.shape[1] * self.rows.index_BT.shape[1]))
                    for x in (self.outer.a_BTD, self.outer.g_BTP, self.rows.value_BTP, self.rows.index_BT)
                ),
                strict=True,
            )
        ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def weighted_sum(self, weight_B: Tensor, keep_B: Tensor) -> Tensor:
        return self.outer.weighted_sum(weight_B, keep_B) + self.rows.weighted_sum(weight_B, keep_B)

    def dense(self) -> Tensor:
        return self.outer.dense() + self.rows.dense()

    def regroup(self, rows: int) -> TiedSum:
        return TiedSum(self.outer.regroup(rows), self.rows.regroup(rows))

    def settle(self) -> TiedSum:
        return self


def _tied_inner_product(a_BSD: Tensor, g_BSV: Tensor, h_BTD: Tensor, index_BT: Tensor) -> tuple[Tensor, Tensor]:
    S, T = a_BSD.shape[1], h_BTD.shape[1]
    g_BST = g_BSV.gather(2, index_BT[:, None, :].expand(-1, S, -1)).double()
    ah_BST = product(a_BSD, h_BTD.mT).double()
    a_norm, h_norm = _token_norms(a_BSD, h_BTD)
    bound = ((a_norm[:, None, :] @ g_BST.abs()).squeeze(1) * h_norm).sum(1)
    relative = gamma(a_BSD.shape[2], product_roundoff(a_BSD, h_BTD)) + gamma(S * T, torch.float64)
    lost = underflow(a_BSD.shape[2], torch.float32) * g_BST.abs().sum((1, 2))
    return (g_BST * ah_BST).sum((1, 2)), 2 * (relative * bound + lost)


def combine(uses: Sequence[PerSampleGradient]) -> PerSampleGradient:
    """The per-sample gradient of a parameter that was used several times in one forward: the sum over its uses."""
    if len(uses) == 1:
        return uses[0]
    outers = [u for u in uses if isinstance(u, OuterProduct)]
    tables = [u for u in uses if isinstance(u, IndexedRows)]
    others = [u for u in uses if not isinstance(u, OuterProduct | IndexedRows)]
    merged: list[PerSampleGradient] = list(others)
    if len(outers) == 1:
        merged.append(outers[0])
    elif outers:
        merged.append(OuterProduct(*(torch.cat(x, 1) for x in zip(*((u.a_BTD, u.g_BTP) for u in outers), strict=True))))
    if len(tables) == 1:
        merged.append(tables[0])
    elif tables:
        index, value = (torch.cat(x, 1) for x in zip(*((u.index_BT, u.value_BTP) for u in tables), strict=True))
        merged.append(IndexedRows.compress(index, value, tables[0].vocabulary))
    if len(merged) == 1:
        return merged[0]
    if len(merged) == 2 and outers and tables:
        return TiedSum(merged[0], merged[1])  # type: ignore[arg-type]
    if len(merged) == 2 and others and tables:
        return Materialized(merged[1].plus(merged[0].dense()))  # type: ignore[attr-defined]
    return Materialized(functools.reduce(torch.add, (u.dense() for u in merged)))
