"""Many per-sample gradients at once: their norms, and their weighted sums, in as few launches as these can be made in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fsdp_dp.columns import is_few, portions, side_by_side
from fsdp_dp.gradients import (
    Formed,
    IndexedRows,
    Materialized,
    OuterProduct,
    PerSampleGradient,
    add_sharing_inputs,
    stored_norm_terms,
)
from fsdp_dp.kernels import outer as fused
from fsdp_dp.kernels import vectors
from fsdp_dp.norm_terms import NormTerms, TermsOfGroups
from fsdp_dp.standing_sums import Standing
from fsdp_dp.vector_gradients import SideBySide


class NormTally:
    """Norm terms of the parameters that are added, until `measured`, in as few kernels as they can be measured in.

    Stored gradients of vectors wait for `measured`, and so does the end of what `fused.GhostNorms` measures.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._ghosts: fused.GhostNorms | None = None
        self._terms: list[Tensor] = []
        self._owners: list[int] = []
        self._waiting: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self._vectors: list[tuple[SideBySide, list[int]]] = []

    def add(
        self, gradients: Sequence[PerSampleGradient], owners: Sequence[int] | None = None, *, all_wait: bool = False
    ) -> None:
        """``owners`` says which group each is in, 0 if nothing is said. With ``all_wait``, all stored gradients wait."""
        outers: list[OuterProduct] = []
        dropped: list[tuple[Tensor, Tensor]] = []
        formed: list[tuple[Tensor, Tensor]] = []
        of_outers: list[int] = []
        of_dropped: list[int] = []
        of_formed: list[int] = []
        now: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        for number, gradient in enumerate(gradients):
            owner = 0 if owners is None else owners[number]
            if isinstance(gradient, OuterProduct) and gradient.in_fused_gram:
                outers.append(gradient)
                of_outers.append(owner)
            elif isinstance(gradient, OuterProduct) and gradient.is_fused:
                dropped.append((gradient.a_BTD, gradient.g_BTP))
                of_dropped.append(owner)
            elif isinstance(gradient, Formed):
                formed.append((gradient.value_BPD, gradient.squares_BNF))
                of_formed.append(owner)
            elif isinstance(gradient, Materialized | IndexedRows):
                value = gradient.value if isinstance(gradient, Materialized) else gradient.value_BTP
                waits = self._waiting if all_wait or is_small_vector(gradient) else now
                waits.setdefault((owner, value.dtype), []).append(value)
            else:
                self._take(owner, gradient.norm_terms())
        if outers:
            self._ghosts = self._ghosts or fused.GhostNorms(self._rows, self._device)
            add_sharing_inputs(self._ghosts, outers, of_outers)
        for terms, whose in (
            (fused.instantiated_norms(dropped) if dropped else None, of_dropped),
            (fused.stored_norms(formed) if formed else None, of_formed),
        ):
            if terms is not None:
                self._terms += terms.unbind()
                self._owners += whose
        self._measure_stored(now)

    def add_vectors(self, joint: Sequence[SideBySide], owner_of: Mapping[str, int]) -> None:
        """They wait for `measured`."""
        for one in joint:
            if vectors.usable(one.value_BN):
                self._vectors.append((one, [owner_of[name] for name in one.widths]))
            else:
                apart = one.apart()
                self.add(list(apart.values()), [owner_of[name] for name in apart], all_wait=True)

    def _take(self, owner: int, terms: NormTerms) -> None:
        self._terms.append(terms.stack())
        self._owners.append(owner)

    def _measure_stored(self, values: Mapping[tuple[int, torch.dtype], list[Tensor]]) -> None:
        for (owner, _), of_owner in values.items():
            self._take(owner, stored_norm_terms(of_owner))

    def _measured_side_by_side(self) -> list[tuple[Tensor, tuple[int, ...]]]:
        joint, self._vectors = self._vectors, []
        return [
            vectors.squared_norms(
                joined,
                [width for one, _ in part for width in one.widths.values()],
                [o for _, owners in part for o in owners],
            )
            for joined, part in _joined(joint)
        ]

    def _measured_together(self) -> list[tuple[Tensor, tuple[int, ...]]]:
        """Of the small ones among those that wait and that one launch takes; the others go on waiting."""
        small: dict[str, Tensor] = {}
        owners: dict[str, int] = {}
        for (owner, _), values in sorted(self._waiting.items(), key=lambda item: item[0][0]):
            wait = []
            for x in values:
                if is_few(x) and vectors.usable(x):
                    name = str(len(small))
                    small[name], owners[name] = x, owner
                else:
                    wait.append(x)
            values[:] = wait
        self._waiting = {key: values for key, values in self._waiting.items() if values}
        return [
            vectors.squared_norms(side_by_side(list(part.values())), _widths(part), [owners[n] for n in part])
            for part in portions(small)
        ]

    def measured(self, groups: int = 1) -> TermsOfGroups:
        """Of all that was added since the last call, to so many groups."""
        of_vectors = self._measured_side_by_side() + self._measured_together()
        self._measure_stored(self._waiting)
        owners = self._owners
        parts = [torch.stack(self._terms)] if self._terms else []
        for terms, whose in of_vectors:
            owners = owners + list(whose)
            parts.append(terms)
        if self._ghosts is not None:
            owners = owners + self._ghosts.owners
            parts.append(self._ghosts.terms())
        self._terms, self._owners, self._waiting, self._ghosts = [], [], {}, None
        if not parts:
            parts, owners = [torch.zeros(1, 3, self._rows, dtype=torch.float64, device=self._device)], [0]
        return TermsOfGroups(
            terms_n3B=parts[0] if len(parts) == 1 else torch.cat(parts), owners=tuple(owners), groups=groups
        )


_Joint = tuple[SideBySide, list[int]]


def _joined(joint: Sequence[_Joint]) -> Iterator[tuple[Tensor, Sequence[_Joint]]]:
    """All of a part as one tensor, for as many vectors as fit the scratch side by side."""
    for part in portions({str(number): one.value_BN for number, (one, _) in enumerate(joint)}):
        whole = list(part.values())
        yield whole[0] if len(whole) == 1 else torch.cat(whole, 1), [joint[int(number)] for number in part]


def sums_of_vectors(
    joint: Sequence[SideBySide],
    weight_KB: Tensor,
    keep_KB: Tensor,
    owners: Mapping[str, int],
    into: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """As `weighted_sums`, of vectors that are side by side already."""
    into = into or {}
    sums: dict[str, Tensor] = {}
    rest: list[_Joint] = []
    for one in joint:
        if weight_KB.dtype != one.value_BN.dtype or not vectors.usable(one.value_BN):
            sums |= weighted_sums(one.apart(), weight_KB, keep_KB, into, owners)
            continue
        widths = one.widths
        whose = [owners[name] for name in widths]
        places = {name: into[name] for name in widths if name in into}
        if len(places) == len(widths) and all(places[name].numel() == width for name, width in widths.items()):
            vectors.weighted_sum(one.value_BN, weight_KB, list(widths.values()), whose, list(places.values()))
            sums |= places
        else:
            rest.append((one, whose))
    for joined, part in _joined(rest):
        names = {name: width for one, _ in part for name, width in one.widths.items()}
        total = vectors.weighted_sum(joined, weight_KB, list(names.values()), [o for _, whose in part for o in whose])
        sums |= dict(zip(names, total.split(list(names.values())), strict=True))
    return sums


def total_norm_terms(gradients: Sequence[PerSampleGradient], rows: int, device: torch.device) -> NormTerms:
    """The sum of the norm terms of several parameters."""
    tally = NormTally(rows, device)
    tally.add(gradients, all_wait=True)
    terms = tally.measured().of_groups()
    return NormTerms(norm_sq=terms.norm_sq[0], error=terms.error[0], rounding_sq=terms.rounding_sq[0])


def is_small_vector(gradient: PerSampleGradient) -> bool:
    """Whether it is stored, of a bias or of a norm layer: even those of all layers together are few bytes."""
    return isinstance(gradient, Materialized) and is_few(gradient.value) and gradient.value.ndim <= 2


def weighted_sums(
    gradients: Mapping[str, PerSampleGradient],
    weight_KB: Tensor,
    keep_KB: Tensor,
    into: Mapping[str, Tensor] | None = None,
    owners: Mapping[str, int] | None = None,
    standing: Standing | None = None,
) -> dict[str, Tensor]:
    """``weighted_sum`` of each; small stored gradients together, in one product.

    Weights are ``[B]``, the same for all, or ``[K, B]``, of which each takes its owner's. A weight is zero for rows that are
    not kept, as `clipping.RowWeights` has it: all that kernels ask about them. Sums that kernels make are written to their
    place ``into``, if there is one (see `sharding.sums.Bucket`), those of matrices with what is ``standing``. Kernels take
    weights of the gradients' own format: those of float64 sums may be too far apart for quotients in float32.
    """
    products: dict[str, OuterProduct] = {}
    small: dict[str, Tensor] = {}
    others: dict[str, PerSampleGradient] = {}
    for name, gradient in gradients.items():
        if isinstance(gradient, OuterProduct) and gradient.is_fused and gradient.dtype == weight_KB.dtype:
            products[name] = gradient
        elif isinstance(gradient, Materialized) and is_few(gradient.value):
            small[name] = gradient.value
        else:
            others[name] = gradient
    into, sums = into or {}, dict[str, Tensor]()
    if products:
        found = fused.weighted_outers(
            [(g.a_BTD, g.g_BTP, into.get(n)) for n, g in products.items()],
            weight_KB,
            None if owners is None else [owners[n] for n in products],
            None if standing is None else [standing.taken(n) if n in into else None for n in products],
            0 if standing is None else standing.part,
        )
        sums |= dict(zip(products, found, strict=True))
    if not (small or others):
        return sums
    owner_of = dict.fromkeys(gradients, 0) if owners is None else owners
    rows = [(weight_KB, keep_KB)] if owners is None else list(zip(weight_KB.unbind(), keep_KB.unbind(), strict=True))
    for name, gradient in others.items():
        weight_B, keep_B = rows[owner_of[name]]
        if isinstance(gradient, Formed) or (isinstance(gradient, IndexedRows) and gradient.is_fused):
            onto = standing.taken(name) if standing is not None and name in into else None
            sums[name] = gradient.sum_into(weight_B, into.get(name), onto, 0 if standing is None else standing.part)
        else:
            sums[name] = gradient.weighted_sum(weight_B, keep_B)
    return sums | _small_sums(small, weight_KB, rows, owner_of, into)


def _small_sums(
    small: Mapping[str, Tensor],
    weight_KB: Tensor,
    rows: Sequence[tuple[Tensor, Tensor]],
    owner_of: Mapping[str, int],
    into: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Of stored gradients that are few elements a row; ``rows``: weights and what is kept, of every owner."""
    sums: dict[str, Tensor] = {}
    of_owner: dict[int, dict[str, Tensor]] = {}
    at_once: dict[str, Tensor] = {}
    for name, value in small.items():
        by_kernel = value.dtype == weight_KB.dtype and vectors.usable(value)
        (at_once if by_kernel else of_owner.setdefault(owner_of[name], {}))[name] = value
    placed = {n: x for n, x in at_once.items() if n in into and x.numel() == x.shape[0] * into[n].numel()}
    for part in (*portions(placed), *portions({n: x for n, x in at_once.items() if n not in placed})):
        owns, places = [owner_of[n] for n in part], {n: into[n] for n in part if n in placed}
        whole = side_by_side(list(part.values()))
        joint = vectors.weighted_sum(whole, weight_KB, _widths(part), owns, list(places.values()))
        sums |= places or _taken_apart(joint, part)
    for owner, values in of_owner.items():
        for part in portions(values):
            joint = Materialized(side_by_side(list(part.values()))).weighted_sum(*rows[owner])
            sums |= _taken_apart(joint, part)
    return sums


def _widths(values: Mapping[str, Tensor]) -> list[int]:
    return [x.numel() // x.shape[0] for x in values.values()]


def _taken_apart(joint: Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    pieces = joint.split(_widths(values))
    return {n: piece.view(x.shape[1:]) for (n, x), piece in zip(values.items(), pieces, strict=True)}
