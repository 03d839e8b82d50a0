"""FSDP2 (`fully_shard`) on one or two data dimensions (HSDP), and tensor parallelism below it.

One reduce-scatter per FSDP unit, in float32, as FSDP2 itself would issue: every parameter's gradient is cut along the
dimension that FSDP shards into one piece a rank (padded), the pieces of a unit travel together.

Private names used: a module's ``_get_fsdp_state()``, on it ``_fsdp_param_groups`` (torch 2.11: ``_fsdp_param_group``),
``_mp_policy``, ``_training_state``, ``_comm_ctx.post_forward_order`` and ``_state_ctx`` (on that ``all_states``,
``iter_forward_root`` and ``post_backward_final_callback_queued``); of a group ``fsdp_params``, ``_training_state`` and
``finalize_backward()``; of each of the former ``_module_info``, ``mesh_info`` and ``fsdp_placement``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fsdp_dp import kernels
from fsdp_dp.numerics import accumulate_dtype
from fsdp_dp.sharding.base import ManagedParameter, narrow_reduction, trainable_names
from fsdp_dp.sharding.layout import Cut, box, region
from fsdp_dp.sharding.sums import Bucket, Unit
from fsdp_dp.sharding.tensor_parallel import TensorParallel, split_group, tensor_cut


class Fsdp2Model(TensorParallel):
    kind = "FSDP2 (fully_shard)"

    def __init__(self, root: nn.Module) -> None:
        if not isinstance(root, FSDPModule):
            raise ValueError(
                "make_private: parts of this model are sharded with fully_shard, but the model itself is not; "
                "call fully_shard(model) on the root last, then make_private(model, ...)"
            )
        self.root = root
        self._wrapped = [module for module in root.modules() if isinstance(module, FSDPModule)]
        self.prepare_forward()
        named = trainable_names(root)
        sites = dict(_sharded_sites(root))
        shardings = {name: _sharding_of(name, sites, uses) for name, uses in named.items()}
        mesh = _common_mesh(shardings)
        self.names = {site: name for name, uses in named.items() for site in uses}
        self._held = {site: p for _, p, places in _held(root) for site in places}
        parameters = {name: getattr(*named[name][0]) for name in sorted(named)}
        self.data_groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
        self.split_group = split_group(parameters, mesh.ndim)
        self.device = _compute_device(mesh)
        tensor_cuts = {name: tensor_cut(p, mesh.ndim) for name, p in parameters.items()}
        self.tensor_cuts = {name: cut for name, cut in tensor_cuts.items() if cut is not None}
        units = {group: i for i, group in enumerate(dict.fromkeys(s.group for _, s in _sharded_sites(root)))}
        placed = {name: _Placed.of(p, shardings[name], tensor_cuts[name]) for name, p in parameters.items()}
        self.units = [
            _Unit({n: p for n, p in placed.items() if units[shardings[n].group] == i}, mesh) for i in range(len(units))
        ]
        self.parameters = [
            ManagedParameter(
                name=name,
                index=index,
                parameter=p,
                numel=p.numel(),
                region=region(p.shape, placed[name].cuts),
                split=name in self.tensor_cuts,
                unit=units[shardings[name].group],
                accumulator=self.units[units[shardings[name].group]].accumulators[name],
            )
            for index, (name, p) in enumerate(parameters.items())
        ]
        self._check_local_shards()
        self._global_numel = sum(p.numel() for p in parameters.values())
        policies = [m._get_fsdp_state()._mp_policy for m in self._wrapped]
        self.narrow_reduction = narrow_reduction(p.reduce_dtype for p in policies)

    def holds(self, module: nn.Module, attribute: str, value: Tensor) -> bool:
        """Gathered, or as its shard."""
        p = self._held[module, attribute]
        return value is getattr(p, "_unsharded_param", None) or value is p.sharded_param

    @property
    def places_vectors(self) -> bool:
        return kernels.available(self.device) and any(unit.shard_group is not None for unit in self.units)

    def prepare_forward(self) -> None:
        """An evaluation leaves units gathered, and with the ``requires_grad`` that they had then."""
        for module in self._wrapped:
            module.reshard()

    def zero_accumulators(self) -> None:
        super().zero_accumulators()
        self._end_failed_pass()

    def _end_failed_pass(self) -> None:
        """FSDP2 ends a backward in a callback, which one that fails never calls. Units would stay gathered, or on their way,
        with the weights that they had then, and no backward after it would be ended either."""
        root = self.root._get_fsdp_state()  # type: ignore[operator]
        if not hasattr(root._comm_ctx, "post_forward_order"):
            return  # no forward was run yet
        for state in root._state_ctx.all_states:
            state._training_state = type(state._training_state).IDLE
            for group in _groups(state):
                group._training_state = type(group._training_state).IDLE
                group.finalize_backward()  # drops what was prefetched
        root._comm_ctx.post_forward_order.clear()
        root._state_ctx.iter_forward_root = None
        root._state_ctx.post_backward_final_callback_queued = False
        self.prepare_forward()

    def _check_local_shards(self) -> None:
        """What we think that this rank holds is what it holds."""
        for p in self.parameters:
            assert isinstance(p.parameter, DTensor)
            local = p.parameter.to_local()
            if p.region.numel != local.numel():
                raise ValueError(
                    f"make_private: cannot place the local shard {tuple(local.shape)} of parameter '{p.name}' "
                    f"({p.parameter.placements} on {p.parameter.device_mesh})"
                )


@dataclasses.dataclass(frozen=True)
class _Sharding:
    """How FSDP2 holds one parameter: in which group (unit), over which data mesh, cut along which dimension."""

    group: int
    mesh: DeviceMesh
    dim: int


def _groups(state: Any) -> list[Any]:
    """Of parameters; none where a unit has no parameters of its own."""
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]


def _held(root: nn.Module) -> Iterator[tuple[Any, Any, list[tuple[nn.Module, str]]]]:
    """Every parameter that FSDP2 shards, unit by unit: its group, it, and every (module, attribute) that it has."""
    states = dict.fromkeys(m._get_fsdp_state() for m in root.modules() if isinstance(m, FSDPModule))
    for state in states:
        for group in _groups(state):
            for p in group.fsdp_params:
                info = p._module_info
                shared = zip(info.shared_modules, info.shared_param_names, strict=True)
                yield group, p, [(info.module, info.param_name), *shared]


def _sharded_sites(root: nn.Module) -> Iterator[tuple[tuple[nn.Module, str], _Sharding]]:
    """Every (module, attribute) whose parameter FSDP2 shards, unit by unit."""
    for group, p, sites in _held(root):
        sharding = _Sharding(id(group), _data_mesh(p.mesh_info, p._module_info.param_name), p.fsdp_placement.dim)
        for site in sites:
            yield site, sharding


def _data_mesh(info: Any, name: str) -> DeviceMesh:
    """The mesh over which rows differ: (shard,) or (replicate, shard)."""
    expected = {1: (None, 0), 2: (0, 1)}.get(info.mesh.ndim)
    if (info.replicate_mesh_dim, info.shard_mesh_dim) != expected or getattr(info, "is_spmd_mesh", False):
        raise ValueError(
            f"make_private: the parameters '{name}' are spread over {info.mesh} with replicas along dimension "
            f"{info.replicate_mesh_dim} and shards along {info.shard_mesh_dim}; supported are fully_shard on a 1-D mesh and "
            "on a 2-D mesh (replicate, shard), without dp_mesh_dims"
        )
    return info.mesh  # type: ignore[no-any-return]


def _sharding_of(
    name: str, sites: Mapping[tuple[nn.Module, str], _Sharding], uses: list[tuple[nn.Module, str]]
) -> _Sharding:
    found = {sites[use] for use in uses if use in sites}
    if len(found) != 1:
        raise ValueError(
            f"make_private: parameter '{name}' is trainable but not sharded while others are (or tied across fully_shard "
            "units); apply fully_shard to the root so that it manages every parameter, or freeze this one"
        )
    return found.pop()


def _common_mesh(shardings: Mapping[str, _Sharding]) -> DeviceMesh:
    meshes = list(dict.fromkeys(sharding.mesh for sharding in shardings.values()))
    if len(meshes) != 1:
        raise ValueError(
            f"make_private: fully_shard was applied with different meshes ({meshes}); use one for all units, or the sums of "
            "some would miss rows"
        )
    return meshes[0]


def _compute_device(mesh: DeviceMesh) -> torch.device:
    """Of forward and backward; with CPU offload, parameters are elsewhere."""
    kind = mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


@dataclasses.dataclass(frozen=True)
class _Placed:
    """A parameter with the shape of the gradient that this rank computes, and the dimension along which FSDP cuts it."""

    parameter: DTensor
    shape: tuple[int, ...]
    dim: int
    cuts: tuple[Cut, ...]

    @staticmethod
    def of(p: DTensor, sharding: _Sharding, tensor: Cut | None) -> _Placed:
        shape = tuple(size for _, size in box(p.shape, [] if tensor is None else [tensor]))
        shard = sharding.mesh.ndim - 1
        data = Cut(sharding.dim, sharding.mesh.size(shard), sharding.mesh.get_local_rank(shard))
        return _Placed(p, shape, sharding.dim, (data,) if tensor is None else (tensor, data))

    @property
    def padded_shard_numel(self) -> int:
        """Elements of the largest shard on any rank."""
        sizes = list(self.shape)
        sizes[self.dim] = -(-sizes[self.dim] // self.cuts[-1].parts)
        return torch.Size(sizes).numel()


class _Unit(Unit):
    """The managed parameters of one FSDP unit, side by side in their bucket and in their accumulators.

    First those in equal parts along dimension 0: their gradients reach the bucket without a detour, matrices and vectors
    from the kernels that make them.
    """

    def __init__(self, placed: dict[str, _Placed], mesh: DeviceMesh) -> None:
        shards = mesh.size(mesh.ndim - 1)
        even = {n: p for n, p in placed.items() if p.dim == 0 and p.shape and p.shape[0] % shards == 0}
        self._uneven = {n: p for n, p in placed.items() if n not in even}
        self._placed = even | self._uneven
        local = [p.parameter.to_local() for p in self._placed.values()]
        dtype = max((accumulate_dtype(x.dtype) for x in local), key=lambda dtype: dtype.itemsize, default=torch.float32)
        self._widths = [p.padded_shard_numel for p in self._placed.values()]
        buffer = torch.zeros(sum(self._widths), dtype=dtype, device=local[0].device if local else "cpu")
        super().__init__(buffer, mesh.get_group(mesh.ndim - 1), mesh.get_group(0) if mesh.ndim == 2 else None)
        self.numels = {name: torch.Size(p.shape).numel() for name, p in self._placed.items()}
        for name, x, piece in zip(self._placed, local, buffer.split(self._widths), strict=True):
            self.accumulators[name] = piece[: x.numel()]

    def bucket(self, memory: Tensor) -> Bucket:
        return _Bucket(memory, self._placed, self._uneven, self._widths, self.shards)

    def fill(self, bucket: Bucket, gradients: Mapping[str, Tensor]) -> None:
        in_place = {name for name, place in bucket.places.items() if gradients.get(name) is place}
        if not isinstance(bucket, _Bucket) or not in_place:
            self._chunk(self._placed, gradients, bucket.tensor)
            return
        left = {name: part for name, part in bucket.even.items() if name not in in_place}
        moved = left.keys() & gradients.keys()
        if moved:
            torch._foreach_copy_([left[n] for n in moved], [gradients[n].reshape(left[n].shape) for n in moved])
        for name in left.keys() - moved:
            left[name].zero_()
        if self._uneven:
            self._chunk(self._uneven, gradients, bucket.uneven)

    def _chunk(self, placed: Mapping[str, _Placed], gradients: Mapping[str, Tensor], out: Tensor) -> None:
        """As FSDP2 fills its own bucket: cut along dimension 0, padded with zeros, side by side, in one kernel."""
        whole = [self._whole(p, gradients.get(name), out) for name, p in placed.items()]
        out = out.view(self.shards, -1)
        if out.is_contiguous():
            torch._chunk_cat(whole, dim=0, num_chunks=self.shards, out=out)
        else:
            out.copy_(torch._chunk_cat(whole, dim=0, num_chunks=self.shards))

    def _whole(self, p: _Placed, gradient: Tensor | None, like: Tensor) -> Tensor:
        """A gradient with the dimension that FSDP cuts in front, shard after shard; zeros if there is none."""
        if gradient is None:
            gradient = like.new_zeros(p.shape)
        elif gradient.shape != p.shape:  # in its place, or without dimensions of size 1: it would be cut elsewhere
            gradient = gradient.reshape(p.shape)
        gradient = gradient.to(like.dtype)  # a unit may have layers in float64 and in others
        return gradient if p.dim == 0 else torch.cat(gradient.chunk(self.shards, p.dim))


class _Bucket(Bucket):
    """Views of a bucket: ``even`` by name, ``[shards, numel / shards]``, and all that is ``uneven`` together."""

    def __init__(
        self, memory: Tensor, placed: Mapping[str, _Placed], uneven: Collection[str], widths: Sequence[int], shards: int
    ) -> None:
        parts = dict(zip(placed, memory.view(shards, -1).split(widths, dim=1), strict=True))
        self.even = {name: part for name, part in parts.items() if name not in uneven}
        self.uneven = memory.view(shards, -1)[:, sum(part.shape[1] for part in self.even.values()) :]
        places = {n: part for n, part in self.even.items() if len(placed[n].shape) == 1}
        matrices = {n: part for n, part in self.even.items() if len(placed[n].shape) == 2}
        places |= {n: part.unflatten(1, (-1, placed[n].shape[1])) for n, part in matrices.items()}
        super().__init__(memory, places, parts)
