"""FSDP1 (`FullyShardedDataParallel`): gradients into the flat parameter's layout. The only file that uses its insides.

Private names used, checked by `_check_private_names` when a model is attached: ``FSDP.fsdp_modules``, ``_handle``,
``_handle.flat_param``, ``_handle._get_flat_param_offsets()``, ``_handle.process_group``, ``_handle.world_size``,
``_handle.uses_sharded_strategy``, ``_handle._use_sharded_views``, and on the flat parameter ``_param_infos``,
``_shared_param_infos``, ``_shard_param_infos``, ``_is_padding_mask``, ``_sharded_size``, ``_params``. In torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from fsdp_dp.numerics import accumulate_dtype
from fsdp_dp.sharding.base import (
    ManagedParameter,
    Region,
    ShardedModel,
    canonical_name,
    narrow_reduction,
    start_reduce_scatter,
)

_HANDLE_NAMES = ("flat_param", "_get_flat_param_offsets", "process_group", "world_size", "uses_sharded_strategy",
                 "_use_sharded_views")  # fmt: skip
_FLAT_NAMES = (
    "_param_infos", "_shared_param_infos", "_shard_param_infos", "_is_padding_mask", "_sharded_size", "_params",
)  # fmt: skip


class Fsdp1Model(ShardedModel):
    kind = "FSDP1 (FullyShardedDataParallel)"

    def __init__(self, root: FullyShardedDataParallel) -> None:
        self.root = root
        handles = [m._handle for m in FullyShardedDataParallel.fsdp_modules(root) if m._handle is not None]
        for handle in handles:
            _check_private_names(handle)
            _check_strategy(handle)
        self._whole_handles = [handle for handle in handles if not handle.uses_sharded_strategy]
        module_names = {module: name for name, module in root.named_modules()}
        self._units = [_Unit(handle, module_names) for handle in handles]
        self.unit_count = len(self._units)
        self.names = {site: name for unit in self._units for site, name in unit.names.items()}
        self.device = self._units[0].buffer.device
        self.data_group = handles[0].process_group
        self.groups = [self.data_group]
        policies = [m.mixed_precision for m in FullyShardedDataParallel.fsdp_modules(root)]
        self.narrow_reduction = narrow_reduction(p.reduce_dtype for p in policies if p is not None)
        entries = sorted((e for unit in self._units for e in unit.entries), key=lambda e: e.name)
        self.parameters = [
            ManagedParameter(
                name=entry.name,
                index=index,
                parameter=entry.parameter,
                numel=entry.numel,
                region=entry.region,
                split=False,
                unit=self._units.index(entry.unit),
                accumulator=entry.accumulator,
            )
            for index, entry in enumerate(entries)
        ]
        self._global_numel = sum(entry.numel for entry in entries)
        self._in_flight: list[tuple[_Unit, Tensor, Tensor, dist.Work | None]] = []

    def prepare_forward(self) -> None:
        """Nothing is left behind."""

    def after_backward(self) -> None:
        """Without weight gradients FSDP1 leaves an unsharded (one rank) unit's parameters unregistered: put them back."""
        for handle in self._whole_handles:
            handle._use_sharded_views()

    def start_accumulate(self, unit: int, gradients: Mapping[str, Tensor]) -> None:
        target = self._units[unit]
        if not target.entries:
            return
        bucket = target.fill_bucket(gradients)
        if target.world_size == 1:
            self._in_flight.append((target, bucket[: target.buffer.numel()], bucket, None))
            return
        shard = torch.empty_like(target.buffer)
        work = start_reduce_scatter(shard, bucket, self.data_group)
        self._in_flight.append((target, shard, bucket, work))

    def finish_accumulate(self) -> None:
        for unit, shard, _bucket, work in self._in_flight:
            if work is not None:
                work.wait()
            unit.buffer.add_(shard)
        self._in_flight.clear()

    def publish(self, parameter: ManagedParameter, gradient: Tensor) -> None:
        p = parameter.parameter
        if gradient.numel():
            p.grad = gradient.view(p.shape).to(p.dtype)


def is_outermost(unit: FullyShardedDataParallel) -> bool:
    """Whether a unit whose forward starts now is a root: torch's root marks all others before it calls any of them."""
    return unit._is_root is not False


class _Entry:
    """One trainable parameter inside a flat parameter."""

    def __init__(self, unit: _Unit, name: str, parameter: nn.Parameter, start: int, numel: int, info: Any) -> None:
        self.unit, self.name, self.parameter, self.start, self.numel = unit, name, parameter, start, numel
        count = info.numel_in_shard if info.in_shard else 0
        self.region = Region(start=info.intra_param_start_idx if info.in_shard else 0, count=count)
        offset = info.offset_in_shard if info.in_shard else 0
        self.accumulator = unit.buffer[offset : offset + count]


class _Unit:
    """One FSDP1 unit: its flat layout, its accumulator, and which module attributes its parameters have."""

    def __init__(self, handle: Any, module_names: Mapping[nn.Module, str]) -> None:
        flat = handle.flat_param
        self.world_size = handle.world_size
        local = flat._sharded_size.numel()
        self.padded_numel = local * self.world_size
        self.buffer = torch.zeros(local, dtype=accumulate_dtype(flat.dtype), device=flat.device)
        self.entries: list[_Entry] = []
        self.names: dict[tuple[nn.Module, str], str] = {}
        offsets = [o for o, pad in zip(handle._get_flat_param_offsets(), flat._is_padding_mask, strict=True) if not pad]
        shared: dict[tuple[nn.Module, str], list[tuple[nn.Module, str]]] = {}
        for attribute, module, _, prime_attribute, prime_module, _ in flat._shared_param_infos:
            shared.setdefault((prime_module, prime_attribute), []).append((module, attribute))
        for (attribute, module, _), (start, end), parameter, info in zip(
            flat._param_infos, offsets, flat._params, flat._shard_param_infos, strict=True
        ):
            if not parameter.requires_grad:
                continue
            sites = [(module, attribute), *shared.get((module, attribute), [])]
            name = min(canonical_name(f"{module_names[m]}.{a}".lstrip(".")) for m, a in sites)
            self.names.update(dict.fromkeys(sites, name))
            self.entries.append(_Entry(self, name, parameter, start, end - start + 1, info))

    def fill_bucket(self, gradients: Mapping[str, Tensor]) -> Tensor:
        pieces, end = [], 0
        for entry in self.entries:  # in the order of the flat parameter; frozen ones and padding leave gaps
            if entry.name in gradients:
                pieces += [self.buffer.new_zeros(entry.start - end), gradients[entry.name].flatten()]
                end = entry.start + entry.numel
        return torch.cat([*pieces, self.buffer.new_zeros(self.padded_numel - end)])


def _check_private_names(handle: Any) -> None:
    missing = [n for n in _HANDLE_NAMES if not hasattr(handle, n)]
    missing += [f"flat_param.{n}" for n in _FLAT_NAMES if not hasattr(handle.flat_param, n)]
    if missing:
        raise RuntimeError(
            f"torch {torch.__version__}: FSDP's {', '.join(missing)} are gone, so gradients cannot be placed exactly; "
            "use fully_shard, or a torch version between 2.11 and 2.13"
        )


def _check_strategy(handle: Any) -> None:
    if getattr(handle.flat_param, "_params", None) is None:
        raise ValueError(
            "FullyShardedDataParallel was built with use_orig_params=False; the engine needs the original parameters: "
            "pass use_orig_params=True (fsdp_dp.FullyShardedDataParallel does so by default)"
        )
    strategy = handle._sharding_strategy.name
    if strategy not in ("FULL_SHARD", "SHARD_GRAD_OP") and handle.world_size > 1:
        raise ValueError(
            f"sharding_strategy {strategy} is not supported yet; use FULL_SHARD or SHARD_GRAD_OP "
            "(hybrid strategies also turn into NO_SHARD on one host without a 2-D device_mesh)"
        )
