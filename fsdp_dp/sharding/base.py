"""The interface between the engine and a sharded model.

The engine asks four things of a model: which parameters it has and where their local shards sit in the global
parameter (`ManagedParameter`, `Region`); to sum a unit's gradients over the data-parallel ranks into the local shards
(`accumulate`, always SUM, always in float32 or wider); to sum norms over the ranks that split one row's gradient
(`sum_split_norms`); and to hand a released gradient to the optimizer (`publish`).
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fsdp_dp.gradients import NormTerms
from fsdp_dp.records import Record

_WRAPPER_PREFIXES = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def canonical_name(name: str) -> str:
    """A parameter's name as the unwrapped model has it, so that noise does not depend on how the model is wrapped."""
    return _WRAPPER_PREFIXES.sub("", name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
    """The elements of a global parameter (flattened) that a local shard holds: a run, or a column block of one.

    Without ``columns``: elements ``start .. start + count``. With ``columns = (width, offset, size)``: that run seen
    as rows of ``width``, of which the shard holds columns ``offset .. offset + size``.
    """

    start: int
    count: int
    columns: tuple[int, int, int] | None = None

    @property
    def numel(self) -> int:
        return self.count if self.columns is None else self.count // max(1, self.columns[0]) * self.columns[2]


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
    """A model whose managed parameters are sharded in one particular way."""

    kind: str
    root: nn.Module
    device: torch.device
    parameters: list[ManagedParameter]
    names: dict[tuple[nn.Module, str], str]
    """(module, attribute) -> canonical name, the same for all places of a tied parameter."""
    unit_count: int
    groups: Sequence[dist.ProcessGroup] = ()
    """Groups that together connect all ranks, for agreeing on keys: a value passed through them in order is common."""
    data_group: dist.ProcessGroup | None = None
    split_group: dist.ProcessGroup | None = None

    @abc.abstractmethod
    def prepare_forward(self) -> None:
        """Called before every training forward: undo what a forward without a backward left behind."""

    def after_backward(self) -> None:  # noqa: B027
        """Called at the end of every backward, after the sharding's own end of it."""

    narrow_reduction: torch.dtype | None = None
    """A reduce_dtype that the user's FSDP policy asked for and that is too narrow for un-noised sums."""

    @property
    def data_rank(self) -> int:
        return dist.get_rank(self.data_group) if self.data_group is not None else 0

    @property
    def data_size(self) -> int:
        return dist.get_world_size(self.data_group) if self.data_group is not None else 1

    @property
    def global_numel(self) -> int:
        """Trainable elements of the whole model: the dimension that the noise lattice charges for."""
        return self._global_numel

    _global_numel: int

    @abc.abstractmethod
    def start_accumulate(self, unit: int, gradients: Mapping[str, Tensor]) -> None:
        """Begin summing full (unsharded) gradients of one unit over the data-parallel ranks; missing ones are zero."""

    @abc.abstractmethod
    def finish_accumulate(self) -> None:
        """Add what `start_accumulate` began into the accumulators."""

    @abc.abstractmethod
    def publish(self, parameter: ManagedParameter, gradient: Tensor) -> None:
        """Set the optimizer-visible ``.grad`` from a flat local gradient."""

    def localize(self, name: str, record: Record) -> Record:
        """The local parts of a layer's record."""
        return record

    def sum_split_norms(self, split: NormTerms, whole: NormTerms) -> NormTerms:
        """Norms over all of a row's gradient. Here a rank holds whole layers, so its norms are already complete."""
        return split + whole

    def sum_over_data(self, x: Tensor) -> Tensor:
        """The sum of a small tensor over the data-parallel ranks."""
        if self.data_group is not None:
            x = x.clone()
            dist.all_reduce(x, group=self.data_group)
        return x

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


def start_reduce_scatter(shard: Tensor, bucket: Tensor, group: dist.ProcessGroup | None) -> dist.Work:
    """Sum ``bucket`` over the group, cut into ``shard``-sized pieces; torch 2.13 renamed the collective."""
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return reduce_scatter(shard, bucket, group=group, async_op=True)


def narrow_reduction(dtypes: Iterable[torch.dtype | None]) -> torch.dtype | None:
    """The first of these reduce dtypes that is narrower than float32."""
    return next((dtype for dtype in dtypes if dtype is not None and dtype.itemsize < 4), None)
