"""The clipped sum of one microbatch, put together while its backward runs.

    use      one call of a layer, reported by its tap: per-sample gradients of the layer's parameters   [layers]
    group    once all uses of its parameters are in: norms, weights, weighted sums; its records are free from here on
             (a single group takes the norms of a unit as soon as it can, beside backward; groups of one block are clipped
             together, once the last of them is complete)
    unit     once all its parameters are summed: reduce-scattered                                       [sharding]

What backward never reports (a layer that the loss does not use) is taken care of at its end. Units are reduced in one
order, the same on all ranks, whatever order a rank's backward takes (rule 12); so are norms that ranks add up.
A single group needs every norm, so it waits for the end of backward, where no collective of FSDP's can come between.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from fsdp_dp.clipping import RowWeights
from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.gradients import PerSampleGradient, combine
from fsdp_dp.groups import Group, groups_of_blocks
from fsdp_dp.methods import Measured
from fsdp_dp.norm_terms import TermsOfGroups
from fsdp_dp.sharding import ShardedModel
from fsdp_dp.side_stream import SideStream
from fsdp_dp.together import NormTally, is_small_vector, weighted_sums
from fsdp_dp.vector_gradients import formed
from fsdp_dp.writes import writes

Weigh = Callable[[Sequence[int], TermsOfGroups], RowWeights]


class ClippingPlan:
    """Which group and which unit every parameter is in, and in which order they are finished.

    Attributes:
        groups: in the order of registration; backward is expected to finish them from the last to the first.
        streams: groups are clipped within backward, not at its end.
        batches: groups that are clipped together, in as many launches as one of them; expected in this order.
        parts: of every batch, unit -> its parameters, in the order in which units are reduced.
        side: where the norms of a group that does not stream are taken.
    """

    def __init__(self, model: ShardedModel, groups: Sequence[Group]) -> None:
        self.model, self.groups = model, groups
        self.streams = len(groups) > 1
        self.group_of = {name: index for index, group in enumerate(groups) for name in group.parameters}
        self.unit_of = {p.name: p.unit for p in model.parameters}
        self.is_split = {p.name: p.split for p in model.parameters}
        self.batches = groups_of_blocks(groups, self.unit_of)
        self.batch_of = {group: number for number, batch in enumerate(self.batches) for group in batch}
        self.owner_of = {
            name: batch.index(self.group_of[name]) for batch in self.batches for name in self._names(batch)
        }
        self.unit_order = list(reversed(range(model.unit_count)))
        self.parameters_of_unit = Counter(self.unit_of.values())
        self.parts = [self._by_unit(batch) for batch in self.batches]
        self.side = SideStream(model.device)

    def _names(self, batch: Sequence[int]) -> list[str]:
        return [name for group in batch for name in self.groups[group].parameters]

    def _by_unit(self, batch: Sequence[int]) -> dict[int, list[str]]:
        units: dict[int, list[str]] = defaultdict(list)
        for name in sorted(self._names(batch), key=lambda name: -self.unit_of[name]):
            units[self.unit_of[name]].append(name)
        return units


class ClippedSum:
    """One microbatch's way through a `ClippingPlan`.

    Args:
        rows: of the microbatch, on this rank.
        weigh: from the indices of groups and their norms to the weights of the rows, ``[K, B]``.
    """

    def __init__(self, plan: ClippingPlan, rows: int, weigh: Weigh) -> None:
        self._plan, self._rows, self._weigh = plan, rows, weigh
        self._uses: dict[str, list[PerSampleGradient]] = {}
        self._writes = Counter[str]()
        self._outstanding, self._of_batch, self._of_part = Counter[int](), Counter[int](), Counter[int]()
        self._gradients: dict[str, PerSampleGradient] = {}
        self._whole = NormTally(rows, plan.model.device)
        self._split = NormTally(rows, plan.model.device) if plan.model.split_group is not None else None
        self._batches, self._units = list(range(len(plan.batches))), list(plan.unit_order)
        self._unsummed = Counter(plan.parameters_of_unit)
        self._sums: dict[int, dict[str, Tensor]] = defaultdict(dict)

    def expect(self, name: str) -> None:
        """The forward uses a parameter (once more)."""
        group = self._plan.group_of[name]
        self._outstanding[group] += 1
        self._of_batch[self._plan.batch_of[group]] += 1
        self._of_part[self._plan.unit_of[name]] += 1

    def report(self, name: str, gradient: PerSampleGradient | None) -> None:
        """The backward has come to a use of a parameter; None if the loss does not depend on it.

        Raises:
            UnsupportedModelError: there are more uses than the forward had; some were taken for ones without a gradient.
        """
        if gradient is not None:
            if name in self._gradients:
                raise UnsupportedModelError(
                    f"Parameter '{name}': backward came to its layer more often than forward had called it (a custom "
                    "autograd.Function that differentiates it more than once), when its gradient had been measured. Call the "
                    "layer outside of the function"
                )
            self._uses.setdefault(name, []).append(gradient)
            self._writes[name] += writes(gradient)
        elif not self._plan.streams:
            return  # nobody waits for it before the end, and a backward inside of this one may come to it yet
        group, unit = self._plan.group_of[name], self._plan.unit_of[name]
        batch = self._plan.batch_of[group]
        self._outstanding[group] -= 1
        self._of_batch[batch] -= 1
        self._of_part[unit] -= 1
        if self._outstanding[group] < 0:
            raise UnsupportedModelError(
                f"Parameter '{name}': a backward inside of backward came to its layer, in a graph of its own (a custom "
                "autograd.Function that runs layers under torch.enable_grad()), when its clipping group was thought to be "
                "complete. Call the layer outside of the function, or take clipping='flat'"
            )
        if self._plan.streams and self._of_batch[batch] == 0:
            self._clip_ready_batch(batch)
        elif not self._plan.streams and self._of_part[unit] == 0:
            self._measure(self._plan.parts[batch][unit], self._plan.side.beside)

    def start(self) -> None:
        """The backward begins: groups that nothing is expected of are ready.

        Later would be too late: a rank that has them comes to no other layer before the all-gathers of ranks that wait for
        their sums.
        """
        if self._plan.streams:
            for batch in list(self._batches):
                if self._of_batch[batch] == 0:
                    self._clip_ready_batch(batch)

    def finish(self) -> None:
        """The backward is over: what was not reported has no gradient."""
        while self._batches:
            self._clip(self._batches[0])
        del self._weigh  # it refers back to the microbatch, which would wait for the garbage collector

    @property
    def held(self) -> list[PerSampleGradient]:
        """The per-sample gradients that are kept at this moment."""
        return [gradient for uses in self._uses.values() for gradient in uses] + list(self._gradients.values())

    def _clip_ready_batch(self, latest: int) -> None:
        """Norms that ranks add up are taken in order; others as they come, so that records are freed at once."""
        if self._plan.model.split_group is not None:
            self._clip_first_batches()
        elif latest in self._batches:
            self._clip(latest)

    def _clip_first_batches(self) -> None:
        while self._batches and self._of_batch[self._batches[0]] == 0:
            self._clip(self._batches[0])

    def _clip(self, batch: int) -> None:
        self._batches.remove(batch)
        groups, owners = self._plan.batches[batch], self._plan.owner_of
        for names in self._plan.parts[batch].values():
            self._measure(names)
        self._plan.side.join()
        rows = self._weigh(groups, self._terms_of(len(groups)))
        # A single group has the vectors of all units, which are summed together where each has no place of its own.
        each = self._plan.streams or self._plan.model.places_vectors
        vectors = {} if each else {n: g for n, g in self._gradients.items() if is_small_vector(g)}
        sums_of_vectors = weighted_sums(vectors, rows.weight_B, rows.keep_B, owners=owners)
        for unit, names in self._plan.parts[batch].items():
            of_unit = {name: self._gradients.pop(name) for name in names if name in self._gradients}
            # A unit that is summed as a whole, and is the next to be reduced, needs no room besides its bucket.
            alone = bool(of_unit) and self._units[:1] == [unit] and self._unsummed[unit] == len(names)
            places = self._plan.model.places(unit) if alone else {}
            others = {name: gradient for name, gradient in of_unit.items() if name not in vectors}
            self._sums[unit] |= weighted_sums(others, rows.weight_B, rows.keep_B, places, owners)
            for name, gradient in of_unit.items():
                self._refuse_written(name, [gradient])
            if vectors:
                self._sums[unit] |= {name: sums_of_vectors.pop(name) for name in of_unit if name in vectors}
            self._unsummed[unit] -= len(names)
            self._reduce_ready_units()

    def _measure(self, names: Sequence[str], where: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Take the norms of those of the parameters that have uses and were not measured yet.

        Only that is done ``where``: what it reads is kept until the weights are known, while uses that are combined may
        be freed at once, and so must be read on the main stream.
        """
        used = {name: self._uses.pop(name) for name in names if name in self._uses}
        for name, uses in used.items():
            self._refuse_written(name, uses)
        gradients = formed({name: combine(uses) for name, uses in used.items()})
        if not gradients:
            return
        self._writes.update({name: writes(gradient) for name, gradient in gradients.items()})
        self._gradients |= gradients
        is_split, now = self._plan.is_split, self._plan.streams
        with where():
            if self._split is None:
                self._add(self._whole, gradients, all_wait=now)
            else:
                self._add(self._split, {n: g for n, g in gradients.items() if is_split[n]}, all_wait=now)
                self._add(self._whole, {n: g for n, g in gradients.items() if not is_split[n]}, all_wait=now)

    def _refuse_written(self, name: str, gradients: Sequence[PerSampleGradient]) -> None:
        """What a layer was given, and the gradient of its output, are the program's own tensors, which it may write to."""
        if self._writes.pop(name) != sum(map(writes, gradients)):
            raise UnsupportedModelError(
                f"Parameter '{name}': what its layer was given, or the gradient of its output, was written to in backward, "
                "before the clipped sum was made of it (a hook that changes a gradient in place?). Return a new tensor from "
                "the hook"
            )

    def _add(self, tally: NormTally, gradients: Mapping[str, PerSampleGradient], *, all_wait: bool) -> None:
        owner_of = self._plan.owner_of
        tally.add(list(gradients.values()), [owner_of[name] for name in gradients], all_wait=all_wait)

    def _terms_of(self, groups: int) -> TermsOfGroups:
        """Squared norms over what was measured, and over all ranks that hold a part of a row's gradient."""
        whole = self._whole.measured(groups)
        if self._split is None:
            return whole
        split = self._split.measured(groups).of_groups()
        return TermsOfGroups.of(self._plan.model.sum_split_norms(split, whole.of_groups()))

    def _reduce_ready_units(self) -> None:
        while self._units and self._unsummed[self._units[0]] == 0:
            unit = self._units.pop(0)
            self._plan.model.start_accumulate(unit, self._sums.pop(unit, {}))


class MeasuredNorms:
    """Takes the place of a `ClippedSum` where only the norm of every parameter is asked for (see `independence`).

    A parameter is measured as soon as all its uses are in, so that its records can go when its group is finished.
    """

    def __init__(self) -> None:
        self._uses: dict[str, list[PerSampleGradient]] = {}
        self._outstanding = Counter[str]()
        self._measured: dict[str, Measured] = {}

    def expect(self, name: str) -> None:
        self._outstanding[name] += 1

    def report(self, name: str, gradient: PerSampleGradient | None) -> None:
        if gradient is None:
            return
        self._uses.setdefault(name, []).append(gradient)
        self._outstanding[name] -= 1
        if self._outstanding[name] == 0:
            self._measure(name)

    def finish(self) -> dict[str, Measured]:
        """Of the parameters that the loss depends on."""
        for name in list(self._uses):
            self._measure(name)
        return self._measured

    def _measure(self, name: str) -> None:
        if name in self._uses:
            self._measured |= {n: Measured.of(x) for n, x in formed({name: combine(self._uses.pop(name))}).items()}
