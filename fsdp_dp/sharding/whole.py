"""Parameters that every rank holds whole: on one device, and under `DistributedDataParallel`.

Units are the blocks that FSDP users would wrap, so that a sum never holds a gradient of the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fsdp_dp.errors import PrivacyError
from fsdp_dp.numerics import accumulate_dtype
from fsdp_dp.sharding.base import ManagedParameter, Region, ShardedModel, trainable_names
from fsdp_dp.sharding.sums import Bucket, Unit


class WholeUnit(Unit):
    """Accumulators side by side, in the order of ``parameters``; all ranks of ``group`` hold the same."""

    def __init__(self, parameters: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
        first = next(iter(parameters.values()))
        dtype = max((accumulate_dtype(p.dtype) for p in parameters.values()), key=lambda dtype: dtype.itemsize)
        sizes = [p.numel() for p in parameters.values()]
        super().__init__(torch.zeros(sum(sizes), dtype=dtype, device=first.device), None, group)
        self.accumulators = dict(zip(parameters, self.buffer.split(sizes), strict=True))

    def fill(self, bucket: Bucket, gradients: Mapping[str, Tensor]) -> None:
        pieces = [
            gradients[name].flatten() if name in gradients else torch.zeros_like(accumulator)
            for name, accumulator in self.accumulators.items()
        ]
        torch.cat(pieces, out=bucket.tensor)


class WholeModel(ShardedModel):
    """``root``'s parameters on one device or, with a group, on each of its ranks."""

    kind = "single device"

    def __init__(self, root: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        self.root = root
        named = trainable_names(root)
        self.names = {site: name for name, sites in named.items() for site in sites}
        held = {name: getattr(*named[name][0]) for name in sorted(named)}
        unit_of = blocks({name: sites[0][0] for name, sites in named.items()}, root)
        count = 1 + max(unit_of.values(), default=-1)
        self.units = [
            WholeUnit({name: p for name, p in held.items() if unit_of[name] == i}, group) for i in range(count)
        ]
        self.device = next((p.device for p in held.values()), torch.device("cpu"))
        self.data_groups = [] if group is None else [group]
        self.parameters = [
            ManagedParameter(
                name=name,
                index=index,
                parameter=p,
                numel=p.numel(),
                region=Region(start=0, count=p.numel()),
                split=False,
                unit=unit_of[name],
                accumulator=self.units[unit_of[name]].accumulators[name],
            )
            for index, (name, p) in enumerate(held.items())
        ]
        self._held = held
        self._global_numel = sum(p.numel() for p in held.values())

    def holds(self, module: nn.Module, attribute: str, value: Tensor) -> bool:
        return value is self._held[self.names[module, attribute]]

    def prepare_forward(self) -> None:
        now = self.parameters[0].parameter.device
        if now != self.device:
            raise PrivacyError(
                f"The model was moved from {self.device} to {now} after make_private, away from its sums; call "
                f"model.to('{now.type}') before make_private"
            )

    def publish(self, parameter: ManagedParameter, gradient: Tensor) -> None:
        p = parameter.parameter
        p.grad = gradient.view(p.shape).to(p.dtype)


class DdpModel(WholeModel):
    """DDP's own reduction is held back from forward to the end of backward; the sums are all-reduced instead."""

    kind = "DDP (DistributedDataParallel)"

    def __init__(self, ddp: DistributedDataParallel) -> None:
        _check_ddp(ddp)
        super().__init__(ddp.module, ddp.process_group)
        self.root = self._ddp = ddp
        self._flags: dict[str, bool] = {}

    def prepare_forward(self) -> None:
        super().prepare_forward()
        if self._ddp._join_config.enable:
            raise ValueError(
                "DistributedDataParallel.join: ranks that ran out of rows would miss the sums of the others; use "
                "engine.loader, which gives every rank the same number of microbatches"
            )
        for flag in _SYNCHRONIZATIONS:
            self._flags.setdefault(flag, getattr(self._ddp, flag))
            setattr(self._ddp, flag, False)

    def after_backward(self) -> None:
        super().after_backward()
        for flag, value in self._flags.items():
            setattr(self._ddp, flag, value)
        self._flags.clear()


_SYNCHRONIZATIONS = ("require_backward_grad_sync", "require_forward_param_sync")
"""Flags of DDP: reduce gradients in backward; copy rank 0's buffers in forward (none changes under the engine)."""


def _check_ddp(ddp: DistributedDataParallel) -> None:
    """Refuse what changes gradients or parameters behind the engine's back."""
    problems = {
        "mixed_precision": ddp.mixed_precision is not None,
        "delay_all_reduce_named_params": bool(ddp._delay_all_reduce_params),
        "static_graph=True": ddp.static_graph,
        "parameters split by tensor parallelism": any(hasattr(p, "placements") for p in ddp.parameters()),
    }
    found = [name for name, present in problems.items() if present]
    if found:
        raise ValueError(
            f"make_private: DistributedDataParallel with {found[0]} is not supported; leave it out, or use fully_shard"
        )


def blocks(owners: Mapping[str, nn.Module], root: nn.Module) -> dict[str, int]:
    """Parameter name -> its unit: one for every element of an outermost list of modules, one for the rest."""
    block_of: dict[nn.Module, nn.Module] = {}
    for module in root.modules():  # parents come first
        listed = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) and module not in block_of
        for child in module.children():
            inherited = block_of.get(module, child if listed else None)
            if inherited is not None:
                block_of.setdefault(child, inherited)
    units: dict[nn.Module, int] = {}
    return {name: units.setdefault(block_of.get(owner, root), len(units)) for name, owner in owners.items()}
