"""Over which ranks a case is split, and whether those that hold the same hold the same bits.

``full_shard``: one shard a rank. ``hsdp=RxS``: R copies of S shards. ``tp=T``: the Linears of every block over T neighbours,
which see the same rows, and FSDP over the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

FULL_SHARD = "full_shard"
_PLAN = {
    **{f"attention.{name}": ColwiseParallel for name in ("query", "key", "value")},
    **{"mlp.gate": ColwiseParallel, "mlp.up": ColwiseParallel},
    **{"attention.output": RowwiseParallel, "mlp.down": RowwiseParallel},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharding:
    """``replicate`` copies of ``shard`` shards of ``tensor`` parts: together all ranks."""

    name: str
    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def data_ranks(self) -> int:
        """Ranks that see different rows."""
        return self.replicate * self.shard


def parse(text: str, ranks: int) -> Sharding:
    """``full_shard``, ``hsdp=2x4`` or ``tp=2`` on so many ranks.

    Raises:
        ValueError: it is none of these, or for another number of ranks.
    """
    if text == FULL_SHARD:
        return Sharding(name=text, shard=ranks)
    if found := re.fullmatch(r"hsdp=(\d+)x(\d+)", text):
        copies, shards = map(int, found.groups())
        if copies * shards != ranks:
            raise ValueError(f"--sharding {text}: {copies} copies of {shards} shards are not {ranks} ranks")
        return Sharding(name=text, replicate=copies, shard=shards)
    if found := re.fullmatch(r"tp=([1-9]\d*)", text):
        tensor = int(found[1])
        if ranks % tensor:
            raise ValueError(f"--sharding {text}: {ranks} ranks cannot be divided by {tensor}")
        return Sharding(name=text, shard=ranks // tensor, tensor=tensor)
    raise ValueError(f"--sharding {text}: there are {FULL_SHARD}, hsdp=RxS (say hsdp=2x4) and tp=T (say tp=2)")


@functools.cache
def mesh_of(sharding: Sharding, device: str) -> DeviceMesh:
    """All ranks as (replicate, shard, tensor), less what is not asked for. One for all cases: it has process groups."""
    sizes = {"replicate": sharding.replicate, "shard": sharding.shard, "tensor": sharding.tensor}
    kept = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return init_device_mesh(device, tuple(kept.values()), mesh_dim_names=tuple(kept))


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Of ranks that see different rows: what FSDP shards over."""
    names = mesh.mesh_dim_names or ()
    return mesh[tuple(name for name in names if name != "tensor")]


def data_rank(mesh: DeviceMesh) -> int:
    """Which rows this rank sees; tensor ranks, the last dimension, share theirs."""
    return dist.get_rank() // (mesh["tensor"].size() if "tensor" in (mesh.mesh_dim_names or ()) else 1)


def split_linears(blocks: nn.ModuleList, mesh: DeviceMesh) -> None:
    """Each rank holds some heads and some hidden features; the outputs are summed."""
    for block in blocks:
        there = dict(block.named_modules())
        parallelize_module(block, mesh, {name: style() for name, style in _PLAN.items() if name in there})


@torch.no_grad()
def replicas(model: nn.Module, mesh: DeviceMesh) -> str:
    """``identical`` where every rank that holds the same part of a parameter holds the same bits, ``differ``, or ``none``."""
    compared = same = 0
    for parameter in model.parameters():
        for group in _copies(parameter, mesh):
            mine = _bits(parameter)
            first = mine.clone()
            dist.broadcast(first, group=group, group_src=0)
            compared, same = compared + 1, same + torch.equal(mine, first)
    everywhere = torch.tensor(compared - same, device=mine.device) if compared else None
    if everywhere is None:
        return "none"
    dist.all_reduce(everywhere)
    return "differ" if everywhere.item() else "identical"


def _copies(parameter: nn.Parameter, mesh: DeviceMesh) -> list[dist.ProcessGroup]:
    """Groups of ranks that hold what this one does: copies, and tensor ranks where a parameter is not split over them."""
    whole = {"replicate", *(() if "tensor" in _dimensions(parameter) else ("tensor",))}
    return [mesh[name].get_group() for name in mesh.mesh_dim_names or () if name in whole]


def _dimensions(parameter: nn.Parameter) -> tuple[str, ...]:
    return (parameter.device_mesh.mesh_dim_names or ()) if isinstance(parameter, DTensor) else ()


def _bits(parameter: nn.Parameter) -> Tensor:
    """This rank's part, as integers: NaN is equal to itself."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.detach().contiguous().view(torch.int32)
