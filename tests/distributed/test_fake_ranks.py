"""What one of 512 ranks would send and hold, from the `fake` process group, whose collectives do nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.distributed.backends import local, privacy_config
from tests.distributed.harness import run
from tests.distributed.test_collectives import Collectives

RANKS, LAYERS = 512, 4
MESHES = {"fsdp2": (512,), "fsdp2 hybrid": (64, 8)}


def blocks(mesh: Any) -> nn.Module:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 1000), nn.Tanh(), nn.Linear(1000, 64)) for _ in range(LAYERS)))
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def count(rank: int, world_size: int) -> dict[str, tuple[dict[str, int], dict[str, int], int, int]]:
    """Collectives of a private and a plain microbatch, elements in accumulators, elements in local shards."""
    from fsdp_dp import make_private

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=37, world_size=RANKS)
    found = {}
    for name, shape in MESHES.items():
        counts = []
        for private in (False, True):
            model = blocks(init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :]))
            engine = make_private(model, privacy_config(max_grad_norm=1.0)) if private else None
            with Collectives() as collectives:
                model(torch.randn(2, 64)).square().mean(1).mean().backward()
            counts.append(dict(collectives.counts))
        assert engine is not None
        held = sum(p.accumulator.numel() for p in engine.model.parameters)
        found[name] = (*counts, held, sum(local(p).numel() for p in model.parameters()))
        assert engine.model.data_size == RANKS and engine.model.data_rank == 37
        engine.detach()
    dist.destroy_process_group()
    return found


def test_one_of_512_ranks_sends_and_holds_what_plain_fsdp_does() -> None:
    (found,) = run(count, 1)
    for name, (plain, private, accumulators, shards) in found.items():
        assert private == plain, name
        assert accumulators == shards
        assert plain["reducescatter"] == LAYERS
        assert plain.get("allreduce", 0) == (LAYERS if "hybrid" in name else 0)
