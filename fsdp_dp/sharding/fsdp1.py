"""FSDP1 (`FullyShardedDataParallel`): gradients into the flat parameter's layout. The only file that uses its insides.

A unit is reduce-scattered over the ranks that shard it (FULL_SHARD, SHARD_GRAD_OP), then all-reduced over those that hold
the same shard (the hybrid strategies); with NO_SHARD it is all-reduced whole.

Private names used, checked by `_check_private_names` when a model is attached: ``FSDP.fsdp_modules``, ``_handle``,
``_inter_node_pg``, ``_handle.flat_param``, ``_handle._get_flat_param_offsets()``, ``_handle.process_group``,
``_handle.device``, ``_handle.uses_sharded_strategy``, ``_handle._use_sharded_views``, ``_handle.needs_unshard()``, and on the
flat parameter ``_full_param_padded`` (after the first forward; also ``_full_prec_full_param_padded``),
``_param_infos``, ``_shared_param_infos``, ``_shard_param_infos``, ``_is_padding_mask``, ``_sharded_size``, ``_params``; on a
root ``training_state`` and ``_post_backward_callback_queued``; torch's
``_post_backward_final_callback`` and ``_reshard``. In torch 2.11 to 2.13.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _post_backward_final_callback, _reshard

from fsdp_dp.numerics import accumulate_dtype
from fsdp_dp.sharding.base import ManagedParameter, Region, ShardedModel, canonical_name, narrow_reduction
from fsdp_dp.sharding.sums import Bucket, Unit

_HANDLE_NAMES = ("flat_param", "_get_flat_param_offsets", "process_group", "device", "uses_sharded_strategy",
                 "_use_sharded_views", "needs_unshard")  # fmt: skip
_FLAT_NAMES = (
    "_param_infos", "_shared_param_infos", "_shard_param_infos", "_is_padding_mask", "_sharded_size", "_params",
)  # fmt: skip


class Fsdp1Model(ShardedModel):
    kind = "FSDP1 (FullyShardedDataParallel)"

    def __init__(self, root: FullyShardedDataParallel) -> None:
        self.root = root
        wrappers: list[Any] = [m for m in FullyShardedDataParallel.fsdp_modules(root) if m._handle is not None]
        for wrapper in wrappers:
            _check_private_names(wrapper._handle)
            _check_orig_params(wrapper._handle)
        self._wrappers = wrappers
        self.data_groups = _data_groups(wrappers[0])
        for wrapper in wrappers:
            _check_ranks(wrapper, self.data_groups)
        self._whole_handles = [m._handle for m in wrappers if not m._handle.uses_sharded_strategy]
        module_names = {module: name for name, module in root.named_modules()}
        units = [_Unit(m._handle, _replicas(m), module_names) for m in wrappers]
        self.units = units
        self.names = {site: name for unit in units for site, name in unit.names.items()}
        self._handle_of = {n: m._handle for m, unit in zip(wrappers, units, strict=True) for n in unit.names.values()}
        self.device = wrappers[0]._handle.device
        policies = [m.mixed_precision for m in FullyShardedDataParallel.fsdp_modules(root)]
        self.narrow_reduction = narrow_reduction(p.reduce_dtype for p in policies if p is not None)
        entries = sorted((e for unit in units for e in unit.entries), key=lambda e: e.name)
        self.parameters = [
            ManagedParameter(
                name=entry.name,
                index=index,
                parameter=entry.parameter,
                numel=entry.numel,
                region=entry.region,
                split=False,
                unit=units.index(entry.unit),
                accumulator=entry.unit.accumulators[entry.name],
            )
            for index, entry in enumerate(entries)
        ]
        self._global_numel = sum(entry.numel for entry in entries)

    def holds(self, module: nn.Module, attribute: str, value: Tensor) -> bool:
        """A view of the flat parameter: of the gathered one, or of the shard."""
        memory = value.untyped_storage().data_ptr()
        return any(memory == m._handle.flat_param.untyped_storage().data_ptr() for m in self._wrappers)

    def is_part(self, name: str, value: Tensor) -> bool:
        """In the shard. One rank may hold all of a parameter there, with its shape, and others nothing of it."""
        handle = self._handle_of[name]
        gathered = (getattr(handle.flat_param, n, None) for n in ("_full_param_padded", "_full_prec_full_param_padded"))
        whole = {x.untyped_storage().data_ptr() for x in gathered if x is not None} - {0}
        return bool(handle.uses_sharded_strategy) and value.untyped_storage().data_ptr() not in whole

    def prepare_forward(self) -> None:
        """An evaluation leaves units gathered, with the weights that they had before an optimizer's step."""
        for wrapper in self._wrappers:
            handle = wrapper._handle
            begun = hasattr(handle.flat_param, "_full_param_padded")
            if begun and handle.uses_sharded_strategy and not handle.needs_unshard():
                _reshard(wrapper, handle, free_unsharded_flat_param=True)

    def after_backward(self) -> None:
        super().after_backward()
        self._register_whole()

    def _register_whole(self) -> None:
        """Without weight gradients FSDP1 leaves the parameters of an unsharded unit unregistered: put them back."""
        for handle in self._whole_handles:
            handle._use_sharded_views()

    def zero_accumulators(self) -> None:
        super().zero_accumulators()
        self._end_failed_pass()

    def _end_failed_pass(self) -> None:
        """FSDP1 ends a backward in a callback, which one that fails never calls. The units that it had gathered would take
        the next forward for a recomputation, and run it on the weights that they were gathered with, for ever."""
        for unit in FullyShardedDataParallel.fsdp_modules(self.root, root_only=True):
            queued = getattr(unit, "_post_backward_callback_queued", False)  # not there before the first forward
            if queued or any(one.training_state.name != "IDLE" for one in FullyShardedDataParallel.fsdp_modules(unit)):
                _post_backward_final_callback(unit, unit.module)
                self._register_whole()

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
        unit.accumulators[name] = unit.buffer[offset : offset + count]


class _Unit(Unit):
    """One FSDP1 unit: its flat layout, its accumulator, and which module attributes its parameters have."""

    def __init__(self, handle: Any, replicas: dist.ProcessGroup | None, module_names: Mapping[nn.Module, str]) -> None:
        flat = handle.flat_param
        local = flat._sharded_size.numel()
        buffer = torch.zeros(local, dtype=accumulate_dtype(flat.dtype), device=flat.device)
        super().__init__(buffer, handle.process_group if handle.uses_sharded_strategy else None, replicas)
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
        self.numels = {entry.name: entry.numel for entry in self.entries}

    def fill(self, bucket: Bucket, gradients: Mapping[str, Tensor]) -> None:
        out, pieces, end = bucket.tensor, [], 0
        for entry in self.entries:  # in the order of the flat parameter; frozen ones and padding leave gaps
            if entry.name in gradients:
                pieces += [out.new_zeros(entry.start - end), gradients[entry.name].flatten()]
                end = entry.start + entry.numel
        torch.cat([*pieces, out.new_zeros(out.numel() - end)], out=out)


def _replicas(wrapper: Any) -> dist.ProcessGroup | None:
    """The ranks that hold the same shard of a unit as this one."""
    if not wrapper._handle.uses_sharded_strategy and not hasattr(wrapper, "_inter_node_pg"):
        return wrapper._handle.process_group  # type: ignore[no-any-return]
    return getattr(wrapper, "_inter_node_pg", None)


def _data_groups(wrapper: Any) -> list[dist.ProcessGroup]:
    between = getattr(wrapper, "_inter_node_pg", None)
    return [*([] if between is None else [between]), wrapper._handle.process_group]


def _check_private_names(handle: Any) -> None:
    missing = [n for n in _HANDLE_NAMES if not hasattr(handle, n)]
    missing += [f"flat_param.{n}" for n in _FLAT_NAMES if not hasattr(handle.flat_param, n)]
    if missing:
        raise RuntimeError(
            f"torch {torch.__version__}: FSDP's {', '.join(missing)} are gone, so gradients cannot be placed exactly; "
            "use fully_shard, or a torch version between 2.11 and 2.13"
        )


def _check_orig_params(handle: Any) -> None:
    if getattr(handle.flat_param, "_params", None) is None:
        raise ValueError(
            "FullyShardedDataParallel was built with use_orig_params=False; the engine needs the original parameters: "
            "pass use_orig_params=True (fsdp_dp.FullyShardedDataParallel does so by default)"
        )


def _check_ranks(wrapper: Any, groups: Sequence[dist.ProcessGroup]) -> None:
    """A unit over fewer ranks than the root would miss the rows of the others."""
    found, expected = (math.prod(dist.get_world_size(g) for g in some) for some in (_data_groups(wrapper), groups))
    if found != expected:
        raise ValueError(
            f"make_private: an FSDP unit ({type(wrapper.module).__name__}) spans {found} ranks and the root {expected}; "
            "give all units the same device_mesh or process_group"
        )
