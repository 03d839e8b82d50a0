"""FSDP2 (`fully_shard`) and tensor parallelism before it: public DTensor interfaces only.

One reduce-scatter per FSDP unit, in float32, as FSDP2 itself would issue: every parameter's gradient is cut along
dimension 0 into one piece a data-parallel rank (padded), the pieces of a unit travel together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from fsdp_dp.gradients import NormTerms
from fsdp_dp.numerics import accumulate_dtype
from fsdp_dp.records import Record
from fsdp_dp.sharding.base import (
    ManagedParameter,
    Region,
    ShardedModel,
    canonical_name,
    narrow_reduction,
    start_reduce_scatter,
    trainable_names,
)


class Fsdp2Model(ShardedModel):
    kind = "FSDP2 (fully_shard)"

    def __init__(self, root: nn.Module) -> None:
        if not isinstance(root, FSDPModule):
            raise ValueError(
                "make_private: parts of this model are sharded with fully_shard, but the model itself is not; "
                "call fully_shard(model) on the root last, then make_private(model, ...)"
            )
        self.root = root
        self.prepare_forward()
        named = trainable_names(root)
        for name, sites in named.items():
            _check_layout(name, getattr(*sites[0]))
        self.names = {site: name for name, sites in named.items() for site in sites}
        dtensors = {name: getattr(*sites[0]) for name, sites in named.items()}
        units = _unit_of_module(root)
        unit_of = {name: units[sites[0][0]] for name, sites in named.items()}
        self.unit_count = 1 + max(unit_of.values(), default=0)
        self._units = [
            _Unit({name: dtensors[name] for name in sorted(named) if unit_of[name] == unit})
            for unit in range(self.unit_count)
        ]
        mesh = max((p.device_mesh for p in dtensors.values()), key=lambda m: m.ndim)
        self.device = next(iter(dtensors.values())).to_local().device
        self.data_group = mesh.get_group(0)
        self.split_group = mesh.get_group(1) if mesh.ndim == 2 else None
        self.groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
        self.parameters = [
            ManagedParameter(
                name=name,
                index=index,
                parameter=dtensors[name],
                numel=dtensors[name].numel(),
                region=_region(dtensors[name]),
                split=_tensor_parallel_dim(dtensors[name]) is not None,
                unit=unit_of[name],
                accumulator=self._units[unit_of[name]].accumulators[name],
            )
            for index, name in enumerate(sorted(named))
        ]
        self._global_numel = sum(p.numel() for p in dtensors.values())
        policies = [m._get_fsdp_state()._mp_policy for m in root.modules() if isinstance(m, FSDPModule)]
        self.narrow_reduction = narrow_reduction(p.reduce_dtype for p in policies)
        self._in_flight: list[tuple[_Unit, Tensor, Tensor, dist.Work | None]] = []

    def prepare_forward(self) -> None:
        """An evaluation leaves units gathered, and with the ``requires_grad`` that they had then."""
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def start_accumulate(self, unit: int, gradients: Mapping[str, Tensor]) -> None:
        target = self._units[unit]
        if not target.parameters:
            return
        bucket = target.fill_bucket(gradients)
        shard = bucket.new_empty(bucket.shape[1])
        work = start_reduce_scatter(shard, bucket.flatten(), self.data_group)
        self._in_flight.append((target, shard, bucket, work))

    def finish_accumulate(self) -> None:
        for unit, shard, _bucket, work in self._in_flight:
            if work is not None:
                work.wait()
            unit.buffer.add_(shard)
        self._in_flight.clear()

    def publish(self, parameter: ManagedParameter, gradient: Tensor) -> None:
        p = parameter.parameter
        assert isinstance(p, DTensor)
        local = gradient.view(p.to_local().shape).to(p.dtype)
        # The parameter's own layout; `DTensor.from_local` would derive it again, 40 us for each of hundreds.
        p.grad = DTensor(local, p._spec, requires_grad=False)  # type: ignore[call-arg]

    def localize(self, name: str, record: Record) -> Record:
        if not any(isinstance(x, DTensor) for x in (*record.inputs, *record.grads)):
            return record
        inputs = tuple(_local(name, "input", x) for x in record.inputs)
        grads = tuple(None if x is None else _local(name, "output gradient", x) for x in record.grads)
        return Record(record.call, inputs, grads)

    def sum_split_norms(self, split: NormTerms, whole: NormTerms) -> NormTerms:
        """Add the squared norms of split parameters over the tensor-parallel ranks; count replicated ones once.

        The replicated part is contributed by the first rank alone, so that all ranks get one and the same number
        and therefore one and the same clip factor.
        """
        if self.split_group is None:
            return split + whole
        stacked = split.stack()
        if dist.get_rank(self.split_group) == 0:
            stacked = stacked + whole.stack()
        dist.all_reduce(stacked, group=self.split_group)
        return NormTerms.unstack(stacked)


class _Unit:
    """The managed parameters of one FSDP unit, their bucket layout and their local accumulators."""

    def __init__(self, parameters: dict[str, DTensor]) -> None:
        self.parameters = parameters
        self.accumulators: dict[str, Tensor] = {}
        if not parameters:
            return
        first = next(iter(parameters.values()))
        self.world_size = first.device_mesh.size(0)
        self.dtype = accumulate_dtype(first.dtype)
        widths = {name: _padded_shard_numel(p) for name, p in parameters.items()}
        self.buffer = torch.zeros(sum(widths.values()), dtype=self.dtype, device=first.to_local().device)
        offset = 0
        for name, width in widths.items():
            self.accumulators[name] = self.buffer[offset : offset + parameters[name].to_local().numel()]
            offset += width

    def fill_bucket(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """``[world size, shard elements]``: row r is what data-parallel rank r will own."""
        bucket = self.buffer.new_empty(self.world_size, self.buffer.numel())
        full = [gradients[name] if name in gradients else self._zeros(p) for name, p in self.parameters.items()]
        # As FSDP2 fills its own bucket: cut along dimension 0, padded with zeros, side by side, in one kernel.
        return torch._chunk_cat(full, dim=0, num_chunks=self.world_size, out=bucket)

    def _zeros(self, parameter: DTensor) -> Tensor:
        """A gradient of zeros, of the shape that this tensor-parallel rank computes."""
        tp_dim, shape = _tensor_parallel_dim(parameter), list(parameter.shape)
        if tp_dim is not None:
            mesh = parameter.device_mesh
            shape[tp_dim] = _chunk(shape[tp_dim], mesh.size(1), mesh.get_local_rank(1))[1]
        return self.buffer.new_zeros(shape)


def _check_layout(name: str, p: nn.Parameter) -> None:
    """Refuse what this file does not place exactly, before anything is trained."""
    if not isinstance(p, DTensor):
        raise ValueError(
            f"make_private: parameter '{name}' is trainable but not sharded while others are; "
            "apply fully_shard to the root so that it manages every parameter, or freeze this one"
        )
    mesh, placements = p.device_mesh, p.placements
    if mesh.ndim > 2 or not isinstance(placements[0], Shard | _StridedShard):
        raise ValueError(
            f"make_private: parameter '{name}' has placements {placements} on a {mesh.ndim}-D mesh; supported are "
            "fully_shard on a 1-D mesh, and tensor parallelism with fully_shard on a 2-D mesh (data, tensor). "
            "Hybrid sharding is not supported yet"
        )
    if placements[0].dim != 0:
        raise ValueError(
            f"make_private: parameter '{name}' is sharded along dimension {placements[0].dim} "
            "(shard_placement_fn); only dimension 0 is supported"
        )
    if mesh.ndim == 2 and not isinstance(placements[1], Shard | Replicate):
        raise ValueError(f"make_private: parameter '{name}' has tensor-parallel placement {placements[1]}")


def _unit_of_module(root: nn.Module) -> dict[nn.Module, int]:
    """Every module -> index of the FSDP unit that owns its direct parameters, in registration order.

    Modules that were sharded as one list share a state, and so a unit.
    """
    units: dict[str, int] = {}
    indices: dict[int, int] = {}
    owner: dict[nn.Module, int] = {}
    for name, module in root.named_modules():
        if isinstance(module, FSDPModule):
            units[name] = indices.setdefault(id(module._get_fsdp_state()), len(indices))
        prefix = name
        while prefix not in units:
            prefix = prefix.rpartition(".")[0]
        owner[module] = units[prefix]
    return owner


def _tensor_parallel_dim(p: DTensor) -> int | None:
    """The tensor dimension that tensor parallelism splits, if any."""
    if p.device_mesh.ndim == 2 and isinstance(p.placements[1], Shard):
        return p.placements[1].dim
    return None


def _chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """(offset, size) of a piece as `torch.chunk` cuts it."""
    width = -(-size // parts)
    start = min(index * width, size)
    return start, min(width, size - start)


def _region(p: DTensor) -> Region:
    """Where the local shard sits: tensor parallelism cuts first, FSDP cuts dimension 0 of what is left."""
    mesh, tp_dim = p.device_mesh, _tensor_parallel_dim(p)
    rows_offset, rows, columns = 0, p.shape[0], None
    width = p.shape.numel() // max(1, p.shape[0])
    if tp_dim is not None:
        offset, size = _chunk(p.shape[tp_dim], mesh.size(1), mesh.get_local_rank(1))
        if tp_dim == 0:
            rows_offset, rows = offset, size
        elif p.ndim == 2:
            columns = (width, offset, size)
        else:
            raise ValueError(f"make_private: a {p.ndim}-D parameter split along dimension {tp_dim} is not supported")
    offset, size = _chunk(rows, mesh.size(0), mesh.get_local_rank(0))
    region = Region(start=(rows_offset + offset) * width, count=size * width, columns=columns)
    if region.numel != p.to_local().numel():
        raise ValueError(f"make_private: cannot place the local shard {tuple(p.to_local().shape)} of {p.placements}")
    return region


def _padded_shard_numel(p: DTensor) -> int:
    """Elements of the largest shard of this parameter on any data-parallel rank."""
    rows, width = p.shape[0], p.shape.numel() // max(1, p.shape[0])
    tp_dim = _tensor_parallel_dim(p)
    if tp_dim == 0:
        rows = _chunk(rows, p.device_mesh.size(1), p.device_mesh.get_local_rank(1))[1]
    elif tp_dim is not None:
        width = _chunk(width, p.device_mesh.size(1), p.device_mesh.get_local_rank(1))[1]
    return -(-rows // p.device_mesh.size(0)) * width


def _local(name: str, what: str, x: Tensor) -> Tensor:
    if not isinstance(x, DTensor):
        return x
    if any(isinstance(p, Partial) for p in x.placements):
        x = x.redistribute(placements=[Replicate() if isinstance(p, Partial) else p for p in x.placements])
    for placement in x.placements:
        if isinstance(placement, Shard) and placement.dim != x.ndim - 1:
            raise ValueError(
                f"Layer '{name}': its {what} is split along dimension {placement.dim} ({x.placements}); only "
                "ColwiseParallel and RowwiseParallel Linears (split along the last dimension) are supported"
            )
    return x.to_local()


def mesh_of(root: nn.Module) -> DeviceMesh | None:
    """The mesh of the first DTensor parameter, None for a model without any."""
    return next((p.device_mesh for p in root.parameters() if isinstance(p, DTensor)), None)


__all__ = ["Fsdp2Model", "canonical_name", "mesh_of"]
