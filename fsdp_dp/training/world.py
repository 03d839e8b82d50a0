"""The processes of a run: rank, device, and the mesh over which data and tensors are split."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fsdp_dp.training.schema import TrainConfig

_runs = itertools.count()


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the others.

    Ranks of `data_mesh` see different rows: (data,), or (replicate, data) where the sharded model has copies.
    `tensor_mesh` is None without tensor parallelism; ranks along it hold parts of the same layers and see the same rows.
    """

    rank: int
    size: int
    device: torch.device
    data_mesh: DeviceMesh
    tensor_mesh: DeviceMesh | None
    store: dist.Store = field(default_factory=dist.HashStore)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files and shows the progress."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        rank = 0
        for size, coordinate in zip(self.data_mesh.shape, self.data_mesh.get_coordinate() or (), strict=True):
            rank = rank * size + coordinate
        return rank

    @property
    def data_size(self) -> int:
        return self.data_mesh.size()

    def sum(self, values: Tensor) -> list[float]:
        """The elementwise sum over all ranks; tensor-parallel peers, which see the same rows, each count."""
        total = values.to(self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, values: Tensor) -> Tensor:
        """Every rank's vector [N], of equal length: [W, N] on the CPU, the ranks in front."""
        gathered = [torch.empty_like(values, device=self.device) for _ in range(self.size)]
        dist.all_gather(gathered, values.to(self.device))
        return torch.stack(gathered).cpu()

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


@contextmanager
def start_world(config: TrainConfig) -> Iterator[World]:
    """Join the process group that torchrun describes, or one of this process alone, and leave it when all is well.

    After an exception the group is not taken down: that would wait for ranks that are gone.
    """
    device = choose_device(config.device)
    store, rank, size = next(dist.rendezvous("env://")) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
    # A sweep runs several jobs in one process: each must not find the addresses that the last one left.
    store = dist.PrefixStore(f"run {next(_runs)}", store)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        store=store,
        rank=rank,
        world_size=size,
    )
    yield describe_world(config, device, store)
    dist.barrier()
    dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """The device of this process; on CUDA, the one of its local rank."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    check_device(name)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def check_device(name: str) -> None:
    """Raise ValueError, on all ranks of a machine, where one of them was to have a GPU that is not there."""
    count, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if name == "cuda" and not count:
        raise ValueError("device=cuda: torch finds no GPU on this machine; take device=cpu, or device=auto.")
    if name != "cpu" and 0 < count < processes:
        raise ValueError(
            f"device={name}: {processes} processes of this machine need a GPU each, and torch finds {count}: start with "
            f"torchrun --nproc-per-node={count} (NPROC={count} ./scripts/train.sh), or take device=cpu."
        )


def describe_world(config: TrainConfig, device: torch.device, store: dist.Store | None = None) -> World:
    """Rank, size and the mesh (replicate, data, tensor) without the dimensions of size one, neighbours last."""
    size, sharding = dist.get_world_size(), config.sharding
    tensor, replicate = sharding.tensor_parallel_size, sharding.replicate_size
    sizes = {"replicate": replicate, "data": size // tensor // replicate, "tensor": tensor}
    kept = {name: n for name, n in sizes.items() if n > 1 or name == "data"}
    mesh = init_device_mesh(device.type, tuple(kept.values()), mesh_dim_names=tuple(kept))
    data_mesh = mesh[tuple(name for name in kept if name != "tensor")]
    tensor_mesh = mesh["tensor"] if tensor > 1 else None
    return World(
        rank=dist.get_rank(),
        size=size,
        device=device,
        data_mesh=data_mesh,
        tensor_mesh=tensor_mesh,
        store=dist.HashStore() if store is None else store,
    )
