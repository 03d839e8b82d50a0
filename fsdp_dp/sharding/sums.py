"""Sums of gradients over the data-parallel ranks into local shards, at most two at a time, in memory that is reused.

    start   wait for the sum before the last one, hand the last one on to its all-reduce; fill a bucket, reduce-scatter it
    finish  the same until none is under way
    settle  the same, and give the memory back until the next start

So the collectives of one unit run while the weighted sums of the next are computed, and every rank issues them in the
order of the calls. Always SUM, in the format of the accumulators: float32 or float64.

Inside backward a rank may have nothing to add to units that its backward has not come to yet. Their sums wait for no other:
the ranks that they would wait for may need this one's all-gathers first.
"""

from __future__ import annotations

import abc
import functools
from collections import deque
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.standing_sums import Standing

MAX_UNDER_WAY = 2


class Bucket:
    """What a unit sends: shard after shard, each laid out as the unit's ``buffer``.

    Attributes:
        tensor: all of it, flat.
        parts: of every parameter ``[shards, width]``, padded as the accumulators are; none where nobody asks for them.
        places: where whole gradients may be written at once: name -> ``[P, D]``, or ``[shards, P / shards, D]``; of vectors
            ``[shards, P / shards]``.
    """

    def __init__(
        self,
        tensor: Tensor,
        places: Mapping[str, Tensor] | None = None,
        parts: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.tensor, self.places, self.parts = tensor, places or {}, parts or {}


class Unit(abc.ABC):
    """One FSDP unit (or what takes its place): the accumulators of its local shard, and the layout of its bucket.

    Attributes:
        buffer: flat local sums of clipped gradients, padded as the bucket is.
        accumulators: name -> that parameter's part of ``buffer``.
        shard_group: ranks that hold the other shards of the unit; None where this rank holds all of it.
        replicate_group: ranks that hold the same shard; None where nobody does.
        fresh: ``buffer`` holds nothing of this logical batch, so the next sum replaces it.
        given_away: its memory belongs to released gradients; until the next sum it takes no room and reads as zeros.
    """

    def __init__(
        self, buffer: Tensor, shard_group: dist.ProcessGroup | None, replicate_group: dist.ProcessGroup | None
    ) -> None:
        self.buffer, self.fresh, self.given_away = buffer, True, False
        self.accumulators: dict[str, Tensor] = {}
        self.shard_group, self.replicate_group = _unless_alone(shard_group), _unless_alone(replicate_group)

    @property
    def shards(self) -> int:
        return dist.get_world_size(self.shard_group) if self.shard_group is not None else 1

    @functools.cached_property
    def numels(self) -> dict[str, int]:
        """Of the gradients that this rank makes: those of the accumulators, where these are not a part."""
        return {name: x.numel() for name, x in self.accumulators.items()}

    def check(self, gradients: Mapping[str, Tensor]) -> None:
        """One of another size than its parameter's would leave room that nobody writes to, or move the next one."""
        for name, gradient in gradients.items():
            if gradient.numel() != self.numels[name]:
                raise UnsupportedModelError(
                    f"Parameter '{name}': its layer's rule found a gradient of shape {list(gradient.shape)}, but it has "
                    f"{self.numels[name]} elements: its layer does not use it as others of its type do. Freeze it"
                )

    @abc.abstractmethod
    def fill(self, bucket: Bucket, gradients: Mapping[str, Tensor]) -> None:
        """Write full gradients, and zeros for those that are missing; those that are in their place already stay."""

    def bucket(self, memory: Tensor) -> Bucket:
        """A bucket in flat memory of its size, which this unit will use again and again."""
        return Bucket(memory)

    def give_away(self) -> None:
        """What the accumulators hold is somebody else's from now on, or nobody's."""
        if self.given_away:
            return
        nothing = self.buffer.new_zeros(1).untyped_storage()
        self._offsets = {name: x.storage_offset() for name, x in self.accumulators.items()}
        for x in (self.buffer, *self.accumulators.values()):
            x.set_(nothing, 0, x.shape, (0,))  # type: ignore[call-overload]
        self.fresh = self.given_away = True

    def make_room(self) -> None:
        """Memory of its own again, after `give_away`."""
        if self.given_away:
            own = torch.empty(self.buffer.numel(), dtype=self.buffer.dtype, device=self.buffer.device).untyped_storage()
            self.buffer.set_(own, 0, self.buffer.shape, (1,))  # type: ignore[call-overload]
            for name, x in self.accumulators.items():
                x.set_(own, self._offsets[name], x.shape, (1,))  # type: ignore[call-overload]
            self.given_away = False

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Accumulate without any other rank."""
        self.make_room()
        if self.accumulators.keys() - gradients.keys():
            self.zero_if_fresh()
        for name, gradient in gradients.items():
            if self.fresh:
                self.accumulators[name].copy_(gradient.flatten())
            else:
                self.accumulators[name].add_(gradient.flatten().to(self.buffer.device))
        self.fresh = False

    def zero_if_fresh(self) -> None:
        """What the accumulators hold if nothing was added to them."""
        if self.fresh:
            self.make_room()
            self.buffer.zero_()
            self.fresh = False


class Sums:
    """The sums that are under way.

    Args:
        device: where gradients are computed; accumulators may be elsewhere (CPU offload).

    Attributes:
        inside_backward: sums start there, between collectives of the sharding's own.
    """

    def __init__(self, device: torch.device) -> None:
        self.inside_backward = False
        self._memories = deque(_Memory(device) for _ in range(MAX_UNDER_WAY))
        self._nothing = _Nothing(device)
        self._under_way: deque[_Sum] = deque()
        self._reserved = False
        self._device = device

    @torch.no_grad()
    def places(self, unit: Unit) -> Mapping[str, Tensor]:
        """`Bucket.places` of the sum that `start` begins next, which is to be this unit's."""
        if unit.shard_group is None or not unit.accumulators:
            return {}
        return self._next_memory().bucket(unit).places

    @torch.no_grad()
    def standing(self, unit: Unit) -> Standing | None:
        """What whoever writes to `places` may add on the way; None where the sum is not what accumulators hold next."""
        if (
            unit.fresh
            or unit.shard_group is None
            or unit.replicate_group is not None
            or unit.buffer.device != self._device
        ):
            return None
        places = self._next_memory().bucket(unit).places
        slices = {name: place.shape[1:] for name, place in places.items() if place.ndim == 3}
        tensors = {name: unit.accumulators[name].view(shape) for name, shape in slices.items()}
        return Standing(dist.get_rank(unit.shard_group), tensors)

    @torch.no_grad()
    def start(self, unit: Unit, gradients: Mapping[str, Tensor], standing: Standing | None = None) -> None:
        """Begin to add ``gradients`` of all data-parallel ranks to the accumulators of ``unit``.

        ``standing``: what was added to some of them.
        """
        if not unit.accumulators:
            return
        unit.check(gradients)
        if unit.shard_group is None and unit.replicate_group is None:
            unit.add(gradients)
            return
        if self.inside_backward and not gradients and unit.shard_group is not None:
            self._under_way.append(_Sum(unit, gradients, self._nothing))
            return
        memory = self._next_memory()
        self._reserved = False
        self._under_way.append(_Sum(unit, gradients, memory, standing))

    def _next_memory(self) -> _Memory:
        """That of the sum before the last one, which must be over by then."""
        if not self._reserved:
            self._reserved = True
            while len(self._under_way) >= MAX_UNDER_WAY:
                self._finish_first()
            self.hand_on()
            self._memories.rotate()
        return self._memories[0]

    def hand_on(self) -> None:
        """Begin the last collective of every sum that is under way."""
        for one in self._under_way:
            one.hand_on()

    @torch.no_grad()
    def finish(self) -> None:
        """Wait until all that was started is in the accumulators."""
        while self._under_way:
            self._finish_first()

    def settle(self) -> None:
        """`finish`; and until the next sum, buckets take no room on a GPU, beside activations and the optimizer's tensors."""
        self.finish()
        if _room_is_dear(self._device):
            for memory in (*self._memories, self._nothing):
                memory.give_back()

    def waits_for(self) -> list[Unit]:
        """Units whose sums are under way, in the order in which they are finished."""
        return list(dict.fromkeys(one.unit for one in self._under_way))

    @torch.no_grad()
    def finish_unit(self, unit: Unit) -> None:
        """Wait until all that was started of a unit, and before, is in the accumulators."""
        while any(one.unit is unit for one in self._under_way):
            self._finish_first()

    def _finish_first(self) -> None:
        first = self._under_way.popleft()
        first.hand_on()
        first.finish()


class _Memory:
    """Two tensors that one sum after another uses; each grows to the largest that was asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: dict[tuple[str, torch.dtype], Tensor] = {}
        self._buckets: dict[Unit, Bucket] = {}

    def take(self, role: str, numel: int, dtype: torch.dtype) -> Tensor:
        found = self._tensors.get((role, dtype))
        if found is None or found.numel() < numel:
            found = self._tensors[role, dtype] = torch.empty(numel, dtype=dtype, device=self.device)
            if role == "bucket":
                self._buckets.clear()  # which may be views of the one before
        elif not found.untyped_storage().nbytes():
            found.untyped_storage().resize_(found.nbytes)
        return found[:numel]

    def give_back(self) -> None:
        """Take no room until asked for again; views stay what they are, of memory that may then be elsewhere."""
        for tensor in self._tensors.values():
            tensor.untyped_storage().resize_(0)

    def bucket(self, unit: Unit) -> Bucket:
        memory = self.take("bucket", unit.buffer.numel() * unit.shards, unit.buffer.dtype)
        found = self._buckets.get(unit)
        if found is None:
            found = self._buckets[unit] = unit.bucket(memory)
        return found


class _Nothing(_Memory):
    """For sums to which this rank adds nothing, any number at once: they share a bucket of zeros, and no shard."""

    def take(self, role: str, numel: int, dtype: torch.dtype) -> Tensor:
        return (
            super().take(role, numel, dtype)
            if role == "bucket"
            else torch.empty(numel, dtype=dtype, device=self.device)
        )


class _Sum:
    """One ``unit``'s sum on its way: reduce-scatter into the local shard, all-reduce over its replicas, accumulators."""

    def __init__(
        self, unit: Unit, gradients: Mapping[str, Tensor], memory: _Memory, standing: Standing | None = None
    ) -> None:
        unit.make_room()
        self.unit, buffer = unit, unit.buffer
        adds = standing is not None and bool(standing.added)
        self._replaces = adds or (unit.fresh and buffer.device == memory.device)
        self._shard = buffer if self._replaces else memory.take("shard", buffer.numel(), buffer.dtype)
        self._overwrites, unit.fresh = unit.fresh, False
        self._handed_on, self._work = unit.replicate_group is None, None
        if unit.shard_group is None:
            unit.fill(Bucket(self._shard), gradients)
            self.hand_on()
        else:
            bucket = memory.bucket(unit)
            unit.fill(bucket, gradients)
            if standing is not None and adds:
                _add_the_rest(bucket, unit, standing)
            self._work = start_reduce_scatter(self._shard, bucket.tensor, unit.shard_group)

    def hand_on(self) -> None:
        """From the reduce-scatter to the all-reduce, where there is one."""
        if self._handed_on:
            return
        self._handed_on = True
        if self._work is not None:
            self._work.wait()
        self._work = dist.all_reduce(self._shard, group=self.unit.replicate_group, async_op=True)

    def finish(self) -> None:
        assert self._work is not None
        self._work.wait()  # on CUDA, lets the current stream wait: what comes next on it reads the sum
        if self._replaces:
            return
        if self._overwrites:
            self.unit.buffer.copy_(self._shard)
        else:
            self.unit.buffer.add_(self._shard.to(self.unit.buffer.device))


def _add_the_rest(bucket: Bucket, unit: Unit, standing: Standing) -> None:
    """To this rank's part of the bucket, what stands in the accumulators and was not added by who wrote there."""
    rest = [(name, x) for name, x in unit.accumulators.items() if name not in standing.added]
    if rest:
        torch._foreach_add_([bucket.parts[n][standing.part, : x.numel()] for n, x in rest], [x for _, x in rest])


def start_reduce_scatter(shard: Tensor, bucket: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Sum ``bucket`` over the group, cut into ``shard``-sized pieces; torch 2.13 renamed the collective."""
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return reduce_scatter(shard, bucket, group=group, async_op=True)


def _room_is_dear(device: torch.device) -> bool:
    """On a CPU new pages cost more time than their room is worth."""
    return device.type == "cuda"


def dedicated(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Another process group over the same ranks, whose collectives keep an order of their own. Called on all ranks."""
    members: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(members, dist.get_process_group_ranks(group))
    own, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in sorted({tuple(ranks) for ranks in members})])
    return own


def _unless_alone(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    return None if group is None or dist.get_world_size(group) == 1 else group
