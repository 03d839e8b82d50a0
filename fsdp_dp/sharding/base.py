"""The interface between the engine and a sharded model.

The engine asks four things of a model: which parameters it has and where their local shards sit in the global
parameter (`ManagedParameter`, `Region`); to sum a unit's gradients over the data-parallel ranks into the local shards
(`start_accumulate`, always SUM, always in float32 or wider); to sum norms over the ranks that split one row's gradient
(`sum_split_norms`); and to hand a released gradient to the optimizer (`publish`).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fsdp_dp.gradients import PerSampleGradient
from fsdp_dp.module_tree import ModuleTree
from fsdp_dp.norm_terms import NormTerms
from fsdp_dp.records import Record
from fsdp_dp.sharding.layout import Region
from fsdp_dp.sharding.sums import Sums, Unit, dedicated
from fsdp_dp.standing_sums import Standing

Complete = Callable[[dict[str, PerSampleGradient]], dict[str, PerSampleGradient]]
"""From the per-sample gradients of a layer's parameters, by attribute, to those that this rank is to clip and sum."""

_WRAPPER_PREFIXES = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def canonical_name(name: str) -> str:
    """A parameter's name as the unwrapped model has it, so that noise does not depend on how the model is wrapped."""
    return _WRAPPER_PREFIXES.sub("", name)


@dataclasses.dataclass(eq=False, kw_only=True)
class ManagedParameter:
    """One trainable parameter as this rank sees it.

    Attributes:
        name: canonical name, without wrapper prefixes.
        index: position among the sorted names of all managed parameters; part of the noise nonce.
        parameter: the object that the optimizer holds (a local shard, or a DTensor).
        numel: elements of the global parameter.
        region: where the local shard sits in the global parameter.
        split: this row-gradient is split over tensor-parallel ranks, so its squared norms are summed over them.
        unit: index of the FSDP unit whose collective carries it.
        accumulator: flat local sum of clipped gradients, float32 or float64; a view of the unit's buffer.
    """

    name: str
    index: int
    parameter: nn.Parameter
    numel: int
    region: Region
    split: bool
    unit: int
    accumulator: Tensor


class ShardedModel(abc.ABC):
    """A model whose managed parameters are sharded in one particular way.

    Attributes:
        kind: what people call this way.
        device: where forward and backward run.
        names: (module, attribute) -> canonical name, the same for all places of a tied parameter.
        units: what is summed together; a parameter's ``unit`` is an index of it.
        data_groups: the groups whose ranks hold different rows, outermost first; their product holds all rows.
        split_group: ranks that hold parts of the same layers and see the same rows (tensor parallelism).
        narrow_reduction: a reduce_dtype that the user's policy asked for and that is too narrow for un-noised sums.
    """

    kind: str
    root: nn.Module
    device: torch.device
    parameters: list[ManagedParameter]
    names: dict[tuple[nn.Module, str], str]
    units: Sequence[Unit]
    data_groups: Sequence[dist.ProcessGroup] = ()
    split_group: dist.ProcessGroup | None = None
    narrow_reduction: torch.dtype | None = None

    def prepare_forward(self) -> None:  # noqa: B027
        """Called before every training forward: undo what a forward without a backward left behind."""

    def after_backward(self) -> None:
        """Called at the end of every backward, after the sharding's own end of it.

        Whatever its sums send is under way from here on: no rank issues a collective of theirs at another time.
        """
        self._sums.hand_on()

    @property
    def unit_count(self) -> int:
        return len(self.units)

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Groups that together connect all ranks: a value passed through them in order is common."""
        return [*self.data_groups, *([] if self.split_group is None else [self.split_group])]

    @property
    def data_rank(self) -> int:
        """This rank's number among those that hold different rows."""
        rank = 0
        for group in self.data_groups:
            rank = rank * dist.get_world_size(group) + dist.get_rank(group)
        return rank

    @property
    def data_size(self) -> int:
        return math.prod(dist.get_world_size(group) for group in self.data_groups)

    @property
    def global_numel(self) -> int:
        """Trainable elements of the whole model: the dimension that the noise lattice charges for."""
        return self._global_numel

    _global_numel: int

    @functools.cached_property
    def tree(self) -> ModuleTree:
        return ModuleTree(self.root)

    @functools.cached_property
    def names_by_identity(self) -> dict[int, str]:
        """``id`` of every managed parameter's object -> its name."""
        return {id(p.parameter): p.name for p in self.parameters}

    def communication(self) -> list[str]:
        """What a microbatch sends over each dimension of the mesh, beside the parameters that FSDP gathers; for people."""
        units = [unit for unit in self.units if unit.accumulators]
        sharded = [unit for unit in units if unit.shard_group is not None]
        replicated = [unit for unit in units if unit.replicate_group is not None]
        lines = []
        if sharded:
            size = sum(unit.buffer.nbytes * unit.shards for unit in sharded)
            lines.append(f"shard ({sharded[0].shards} ranks): {len(sharded)} reduce-scatter(s), {size:,} bytes in all")
        if replicated:
            ranks = dist.get_world_size(replicated[0].replicate_group)
            size = sum(unit.buffer.nbytes for unit in replicated)
            lines.append(f"replicate ({ranks} ranks): {len(replicated)} all-reduce(s), {size:,} bytes in all")
        if self.split_group is not None:
            ranks = dist.get_world_size(self.split_group)
            lines.append(f"tensor ({ranks} ranks): all-reduces of norms, [5, B] float64 a clipping group, one a block")
        return lines

    @functools.cached_property
    def _sums(self) -> Sums:
        return Sums(self.device)

    def start_accumulate(self, unit: int, gradients: Mapping[str, Tensor], standing: Standing | None = None) -> None:
        """Begin summing full (unsharded) gradients of one unit over the data-parallel ranks; missing ones are zero.

        All ranks call it for the same units in the same order. Of these sums, two at most are under way. ``standing`` is
        what was added to some of them already.
        """
        self._sums.start(self.units[unit], gradients, standing)

    @property
    def places_vectors(self) -> bool:
        """Whether `places` are also of vectors, so that nothing is gained by summing those of all units together."""
        return False

    def places(self, unit: int) -> Mapping[str, Tensor]:
        """Where the gradients of the unit that `start_accumulate` is called for next may be written at once.

        Name -> ``[P, D]``, or ``[W, P / W, D]`` where W shards lie apart; of vectors ``[W, P / W]``.
        """
        return self._sums.places(self.units[unit])

    def standing(self, unit: int) -> Standing | None:
        """What may be added to what is written to these `places`, so that `start_accumulate` need not."""
        return self._sums.standing(self.units[unit])

    def after_forward(self) -> None:
        """Called at the end of every training forward, under which the last microbatch's sums travelled."""
        self._sums.settle()

    def finish_accumulate(self) -> None:
        """Wait until all that `start_accumulate` began is in the accumulators."""
        for _ in self.accumulated():
            pass

    def accumulated(self) -> Iterator[Sequence[ManagedParameter]]:
        """All parameters, in parts, each once what `start_accumulate` began of its units is in the accumulators.

        Asked for by a release alone, so that the last sums of a microbatch travel while the next one is run forward, and
        those of the last microbatch while noise is added to the units before. The parts may differ between ranks.
        """
        late = self._sums.waits_for()
        for units in ([unit for unit in self.units if unit not in late], *([unit] for unit in late)):
            for unit in units:
                self._sums.finish_unit(unit)
                unit.zero_if_fresh()
            yield [p for p in self.parameters if self.units[p.unit] in units]
        self._sums.settle()

    def zero_accumulators(self) -> None:
        """Drop what was summed. The next sums replace it; what none replaces is zero after `finish_accumulate`."""
        self._sums.finish()
        self.give_accumulators_away()

    def give_accumulators_away(self) -> None:
        """Their memory holds released gradients from now on; the next sums get memory of their own."""
        for unit in self.units:
            if unit.accumulators:
                unit.give_away()

    def dedicate_groups(self) -> None:
        """Sum over process groups of their own from now on. To be called on all ranks.

        For sums that start inside backward, where FSDP issues its own collectives: ranks on which other layers ran would
        issue both in different orders.
        """
        own: dict[dist.ProcessGroup | None, dist.ProcessGroup | None] = {None: None}
        for unit in self.units:
            for group in (unit.shard_group, unit.replicate_group):
                if group is not None and group not in own:
                    own[group] = dedicated(group)
            unit.shard_group, unit.replicate_group = own[unit.shard_group], own[unit.replicate_group]
        self._sums.inside_backward = True

    @abc.abstractmethod
    def publish(self, parameter: ManagedParameter, gradient: Tensor) -> None:
        """Set the optimizer-visible ``.grad`` from a flat local gradient."""

    def holds(self, module: nn.Module, attribute: str, value: Tensor) -> bool:
        """Whether a value that a layer has in forward is its managed parameter, and nothing that the program put there."""
        return isinstance(value, nn.Parameter)

    def is_part(self, name: str, value: Tensor) -> bool:
        """Whether a value that the program reads as a parameter is what this rank holds of it. The same on all ranks."""
        return hasattr(value, "placements") or value.numel() != self._sizes[name]

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        return {p.name: p.numel for p in self.parameters}

    def localize(self, layer: str, module: nn.Module, record: Record) -> tuple[Record, Complete]:
        """The local parts of a layer's record, and what makes of their per-sample gradients those of this rank's part."""
        return record, lambda gradients: gradients

    def sum_split_norms(self, split: NormTerms, whole: NormTerms) -> NormTerms:
        """Norms over all of a row's gradient. Here a rank holds whole layers, so its norms are already complete."""
        return split + whole

    def sum_over_data(self, x: Tensor) -> Tensor:
        """The sum of a small tensor over the data-parallel ranks."""
        total = x.clone()
        for group in self.data_groups:
            dist.all_reduce(total, group=group)
        return total

    def agree(self, payload: bytes) -> bytes:
        """Rank 0's bytes, on every rank."""
        for group in self.groups:
            box = torch.tensor(list(payload), dtype=torch.uint8, device=self.device)
            dist.broadcast(box, src=dist.get_global_rank(group, 0), group=group)
            payload = bytes(box.tolist())
        return payload

    def any_rank(self, flag: bool) -> bool:
        """Whether ``flag`` is true on some rank."""
        box = torch.tensor(int(flag), device=self.device)
        for group in self.groups:
            dist.all_reduce(box, op=dist.ReduceOp.MAX, group=group)
        return bool(box)

    def every_rank(self, mine: Any) -> list[Any]:
        """What each rank says, on all of them; something small that can be pickled."""
        found = [mine]
        for group in self.groups:
            box: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(box, found, group=group)
            found = [one for part in box for one in part]
        return found

    def refuse_differences(self, call: str, mine: Mapping[str, Any]) -> None:
        """Raises ValueError, the same on all ranks, if ``call`` was not given the same options on all of them."""
        digest = hashlib.sha256(repr(sorted(mine.items())).encode()).digest()
        if not self.any_rank(self.agree(digest) != digest):
            return
        said = self.every_rank((dist.get_rank(), dict(mine)))
        first, expected = said[0]
        for rank, found in said:
            for name, value in found.items():
                if value != expected[name]:
                    raise ValueError(
                        f"{call}: {name} is {expected[name]!r} on rank {first} and {value!r} on rank {rank}; all ranks "
                        "take part in the same releases, and need the same. Take it from one place on all of them (the "
                        "command line, a file), or send it from rank 0 (torch.distributed.broadcast_object_list)"
                    )

    @property
    def is_first_rank(self) -> bool:
        return all(dist.get_rank(group) == 0 for group in self.groups)


def trainable_names(root: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Canonical name -> every (module, attribute) under which that trainable parameter is registered.

    Tied parameters appear once, under the first of their names in sorted order.
    """
    sites: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for module_name, module in root.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.requires_grad:
                full = canonical_name(f"{module_name}.{attribute}" if module_name else attribute)
                sites.setdefault(id(parameter), []).append((full, module, attribute))
    return {
        min(name for name, _, _ in uses): [(module, attribute) for _, module, attribute in uses]
        for uses in sites.values()
    }


def narrow_reduction(dtypes: Iterable[torch.dtype | None]) -> torch.dtype | None:
    """The first of these reduce dtypes that is narrower than float32."""
    return next((dtype for dtype in dtypes if dtype is not None and dtype.itemsize < 4), None)
