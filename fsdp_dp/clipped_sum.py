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

import torch
from torch import Tensor

from fsdp_dp.clipping import RowWeights
from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.gradients import PerSampleGradient, combine
from fsdp_dp.groups import Group, groups_inside_blocks, groups_of_blocks
from fsdp_dp.methods import Measured
from fsdp_dp.norm_terms import TermsOfGroups
from fsdp_dp.numerics import exact_arithmetic
from fsdp_dp.sharding import ShardedModel
from fsdp_dp.side_stream import SideStream
from fsdp_dp.standing_sums import Standing
from fsdp_dp.together import NormTally, is_small_vector, sums_of_vectors, weighted_sums
from fsdp_dp.vector_gradients import SideBySide, SumOverPositions, formed
from fsdp_dp.writes import writes

Weigh = Callable[[Sequence[int], TermsOfGroups], RowWeights]


class ClippingPlan:
    """Which group and which unit every parameter is in, and in which order they are finished.

    Attributes:
        groups: in the order of registration; backward is expected to finish them from the last to the first.
        streams: groups are clipped within backward, not at its end.
        batches: groups that are clipped together, in as many launches as one of them; expected in this order.
        brief: the parameters whose rows are weighed before backward leaves their block.
        waits_with: parameter -> its batch, which is clipped once all of it is reported; without streaming its unit, which is
            measured then.
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
        inside = groups_inside_blocks(groups, self.unit_of)
        self.brief = frozenset(name for number in inside for name in groups[number].parameters)
        batch_of = {group: number for number, batch in enumerate(self.batches) for group in batch}
        self.owner_of = {
            name: batch.index(self.group_of[name]) for batch in self.batches for name in self._names(batch)
        }
        self.waits_with = {n: batch_of[k] if self.streams else self.unit_of[n] for n, k in self.group_of.items()}
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
        self._outstanding, self._awaited = [0] * len(plan.groups), [0] * max(len(plan.batches), len(plan.unit_order))
        self._gradients: dict[str, PerSampleGradient] = {}
        self._vectors: dict[int, list[SideBySide]] = defaultdict(list)
        self._measured: set[str] = set()
        self._whole = NormTally(rows, plan.model.device)
        self._split = NormTally(rows, plan.model.device) if plan.model.split_group is not None else None
        self._batches, self._units = list(range(len(plan.batches))), list(plan.unit_order)
        self._unsummed = Counter(plan.parameters_of_unit)
        self._sums: dict[int, dict[str, Tensor]] = defaultdict(dict)

    def expect(self, name: str) -> None:
        """The forward uses a parameter (once more)."""
        self._outstanding[self._plan.group_of[name]] += 1
        self._awaited[self._plan.waits_with[name]] += 1

    def report(self, name: str, gradient: PerSampleGradient | None) -> None:
        """The backward has come to a use of a parameter; None if the loss does not depend on it.

        Raises:
            UnsupportedModelError: there are more uses than the forward had; some were taken for ones without a gradient.
        """
        plan = self._plan
        if gradient is not None:
            if name in self._measured:
                raise UnsupportedModelError(
                    f"Parameter '{name}': backward came to its layer more often than forward had called it (a custom "
                    "autograd.Function that differentiates it more than once), when its gradient had been measured. Call the "
                    "layer outside of the function"
                )
            self._uses.setdefault(name, []).append(gradient)
            self._writes[name] += writes(gradient)
        elif not plan.streams:
            return  # nobody waits for it before the end, and a backward inside of this one may come to it yet
        group, waiting = plan.group_of[name], plan.waits_with[name]
        self._outstanding[group] -= 1
        self._awaited[waiting] -= 1
        if self._outstanding[group] < 0:
            raise UnsupportedModelError(
                f"Parameter '{name}': a backward inside of backward came to its layer, in a graph of its own (a custom "
                "autograd.Function that runs layers under torch.enable_grad()), when its clipping group was thought to be "
                "complete. Call the layer outside of the function, or take clipping='flat'"
            )
        if self._awaited[waiting] == 0:
            with exact_arithmetic(plan.model.device):
                if plan.streams:
                    self._clip_ready_batch(waiting)
                else:
                    self._measure(plan.parts[0][waiting], plan.side.beside)

    def start(self) -> None:
        """The backward begins: groups that nothing is expected of are ready.

        Later would be too late: a rank that has them comes to no other layer before the all-gathers of ranks that wait for
        their sums.
        """
        if self._plan.streams:
            for batch in list(self._batches):
                if self._awaited[batch] == 0:
                    self._clip_ready_batch(batch)

    def finish(self) -> None:
        """The backward is over: what was not reported has no gradient."""
        while self._batches:
            self._clip(self._batches[0])
        del self._weigh  # it refers back to the microbatch, which would wait for the garbage collector

    @property
    def held(self) -> list[PerSampleGradient]:
        """The per-sample gradients that are kept at this moment."""
        vectors = [vector for joint in self._vectors.values() for one in joint for vector in one.apart().values()]
        return (
            [gradient for uses in self._uses.values() for gradient in uses] + list(self._gradients.values()) + vectors
        )

    def _clip_ready_batch(self, latest: int) -> None:
        """Norms that ranks add up are taken in order; others as they come, so that records are freed at once."""
        if self._plan.model.split_group is not None:
            self._clip_first_batches()
        elif latest in self._batches:
            self._clip(latest)

    def _clip_first_batches(self) -> None:
        while self._batches and self._awaited[self._batches[0]] == 0:
            self._clip(self._batches[0])

    def _clip(self, batch: int) -> None:
        self._batches.remove(batch)
        groups, owners = self._plan.batches[batch], self._plan.owner_of
        for names in self._plan.parts[batch].values():
            self._measure(names)
        self._plan.side.join()
        rows = self._weigh(groups, self._terms_of(len(groups)))
        weights = (rows.weight_B, rows.keep_B)
        vectors, self._vectors = self._vectors, defaultdict(list)
        # A single group has the vectors of all units, which are summed together where they have no places of their own.
        together: dict[str, Tensor] = {}
        if not (self._plan.streams or self._plan.model.places_vectors):
            together = sums_of_vectors([one for joint in vectors.values() for one in joint], *weights, owners)
            small = {n: self._gradients.pop(n) for n, x in list(self._gradients.items()) if is_small_vector(x)}
            together |= weighted_sums(small, *weights, owners=owners)
            self._refuse_written({name: [gradient] for name, gradient in small.items()})
            vectors.clear()
        for unit, names in self._plan.parts[batch].items():
            self._measured.difference_update(names)  # whoever comes back to them now, comes to groups that are done
            of_unit = {name: self._gradients.pop(name) for name in names if name in self._gradients}
            joint = vectors.pop(unit, [])
            sums = self._sums[unit]
            # A unit that is summed as a whole, and is the next to be reduced, needs no room besides its bucket.
            alone = self._units[:1] == [unit] and self._unsummed[unit] == len(names)
            places = self._plan.model.places(unit) if alone and (of_unit or joint) else {}
            # A single group's sums have nothing but reduce-scatters beside them: a pass of its own costs less there.
            standing = self._plan.model.standing(unit) if places and self._plan.streams else None
            sums |= weighted_sums(of_unit, *weights, places, owners, standing)
            self._refuse_written({name: [gradient] for name, gradient in of_unit.items()})
            sums |= sums_of_vectors(joint, *weights, owners, places)
            if together:
                sums |= {name: together.pop(name) for name in names if name in together}
            self._unsummed[unit] -= len(names)
            self._reduce_ready_units(standing)

    def _measure(self, names: Sequence[str], where: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Take the norms of those of the parameters of a unit that have uses and were not measured yet.

        Only that is done ``where``: what it reads is kept until the weights are known, while uses that are combined may
        be freed at once, and so must be read on the main stream.
        """
        uses = {name: self._uses.pop(name) for name in names if name in self._uses}
        if not uses:
            return
        self._refuse_written(uses)
        self._measured |= uses.keys()
        gradients = {name: combine(of_name) for name, of_name in uses.items()}
        is_split = self._plan.is_split
        parts = [(self._whole, gradients)]
        if self._split is not None:
            parts = [
                (tally, {n: g for n, g in gradients.items() if is_split[n] == wanted})
                for tally, wanted in ((self._split, True), (self._whole, False))
            ]
        now, owners = self._plan.streams, self._plan.owner_of
        for tally, of_tally in parts:
            stored, joint = formed(of_tally)
            self._gradients |= stored
            for name, gradient in stored.items():
                self._writes[name] = writes(gradient)
            if joint:
                self._vectors[self._plan.unit_of[names[0]]] += joint
            with where():
                tally.add(list(stored.values()), [owners[name] for name in stored], all_wait=now)
                tally.add_vectors(joint, owners)

    def _refuse_written(self, gradients: Mapping[str, Sequence[PerSampleGradient]]) -> None:
        """What a layer was given, and the gradient of its output, are the program's own tensors, which it may write to."""
        for name, of_name in gradients.items():
            if self._writes.pop(name) != sum(map(writes, of_name)):
                raise UnsupportedModelError(
                    f"Parameter '{name}': what its layer was given, or the gradient of its output, was written to in "
                    "backward, before the clipped sum was made of it (a hook that changes a gradient in place?). Return a "
                    "new tensor from the hook"
                )

    def _terms_of(self, groups: int) -> TermsOfGroups:
        """Squared norms over what was measured, and over all ranks that hold a part of a row's gradient."""
        whole = self._whole.measured(groups)
        if self._split is None:
            return whole
        split = self._split.measured(groups).of_groups()
        return TermsOfGroups.of(self._plan.model.sum_split_norms(split, whole.of_groups()))

    def _reduce_ready_units(self, standing: Standing | None) -> None:
        """``standing`` is of the first of them, if it was written to its places."""
        while self._units and self._unsummed[self._units[0]] == 0:
            unit = self._units.pop(0)
            self._plan.model.start_accumulate(unit, self._sums.pop(unit, {}), standing)
            standing = None


class MeasuredNorms:
    """Takes the place of a `ClippedSum` where only the norm of every parameter is asked for (see `independence`).

    A parameter is measured as soon as all its uses are in, so that its records can go when its group is finished.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
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
            with exact_arithmetic(self._device):
                self._measure(name)

    def finish(self) -> dict[str, Measured]:
        """Of the parameters that the loss depends on."""
        for name in list(self._uses):
            self._measure(name)
        return self._measured

    def _measure(self, name: str) -> None:
        if name in self._uses:
            gradient = combine(self._uses.pop(name))
            stored = gradient.formed() if isinstance(gradient, SumOverPositions) else gradient
            self._measured[name] = Measured.of(stored)
