"""Plans beside what torch's own profiler counts, and what gloo ranks really send."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fsdp_dp.models.build import build as build_model
from fsdp_dp.models.config import GPTConfig
from fsdp_dp.models.objective import row_losses
from fsdp_dp.planning.fakes import past_first_step
from fsdp_dp.planning.trace import Step, attach, build, replicate, run_optimizer, trace
from fsdp_dp.planning.tracker import MemoryTracker, local
from fsdp_dp.training.building import FSDP1_STRATEGIES, build_optimizer, shard_fsdp1
from fsdp_dp.training.schema import ShardingConfig, TrainConfig
from fsdp_dp.training.world import World, describe_world
from tests.distributed.harness import run
from tests.distributed.test_collectives import Collectives

MODEL = GPTConfig(
    architecture="llama",
    layers=3,
    heads=2,
    width=64,
    mlp_width=176,
    block_size=32,
    vocabulary_size=128,
    norm="rms_norm",
)
SHARDINGS = {
    "fully_shard": ShardingConfig(strategy="fully_shard"),
    "hybrid": ShardingConfig(strategy="hybrid_shard_fsdp2", replicate_size=2),
    "tensor parallel": ShardingConfig(strategy="tensor_parallel", tensor_parallel_size=2),
    **{strategy: ShardingConfig(strategy=strategy) for strategy in ("full_shard", "shard_grad_op", "ddp", "zero1")},
}
SIDES = ("plain", "flat", "block", "layer")
STEPS = 2
TOLERANCE = 0.06
TRIES = {2: 8, 4: 4}
Case = tuple[str, str, int]
CASES: dict[int, list[Case]] = {
    2: [
        *(("fully_shard", side, microbatches) for microbatches in (1, 2) for side in SIDES),
        *(("full_shard", "flat", 1), ("shard_grad_op", "plain", 2)),
        *(("ddp", "plain", 1), ("ddp", "flat", 2), ("zero1", "flat", 1)),
    ],
    4: [(sharding, side, 2) for sharding in ("hybrid", "tensor parallel") for side in ("plain", "flat", "block")],
}


def step(world_size: int, sharding: str, side: str, microbatches: int) -> Step:
    return Step(
        config=TrainConfig(model=MODEL, sharding=SHARDINGS[sharding], device="cpu"),
        world_size=world_size,
        side=side,
        microbatch_size=8,
        accumulates=microbatches > 1,
    )


def measure(rank: int, world_size: int, planned: list[int]) -> list[tuple[int, dict[str, int]]]:
    """The smallest peak of two tries, and of more while it is above what is planned on rank 0, which is asked.

    What gloo's threads still hold of a collective that is over comes on top.
    """
    results = []
    for case, most in zip(CASES[world_size], planned, strict=True):
        tries: list[tuple[int, dict[str, int]]] = []
        another = torch.ones(1)
        while another:
            tries.append(measured(step(world_size, *case), case[-1]))
            above = min(peak for peak, _ in tries) > most * (1 + TOLERANCE)
            another.fill_(len(tries) < 2 or (above and len(tries) < TRIES[world_size]))
            dist.broadcast(another, 0)
        results.append(min(tries, key=lambda found: found[0]))
    return results


def measured(one: Step, microbatches: int) -> tuple[int, dict[str, int]]:
    """The allocator's peak over two steps, and the collectives of its last microbatch."""
    gc.collect()  # what an earlier side has left would be freed, and subtracted, inside
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        world = describe_world(one.config, torch.device("cpu"), dist.HashStore())
        model = real(one, world)
        for tensor in [*map(local, model.parameters()), *model.buffers()]:
            tensor.detach().normal_(std=0.02)
        optimizer = build_optimizer(model, one.config.optimizer, one.config.sharding.strategy)
        model = replicate(one, model, world)
        private = attach(one, model, optimizer, MemoryTracker())
        if private is not None:
            past_first_step(private)
        tokens = torch.zeros(one.microbatch_size, MODEL.block_size, dtype=torch.int64)
        for _ in range(STEPS):
            for _ in range(microbatches):
                with Collectives() as communication:
                    row_losses(model(tokens), tokens).mean().backward()
            run_optimizer(optimizer, MemoryTracker())
    return allocator_peak(profiler), dict(communication.counts)


def real(one: Step, world: World) -> nn.Module:
    """The model as it is trained: FSDP1's strategies with FSDP1, although they are planned with FSDP2."""
    if one.config.sharding.strategy in FSDP1_STRATEGIES:
        return shard_fsdp1(build_model(one.config.model), one.config, world)
    model = build(one, replace(world, device=torch.device("meta")))
    return model.to_empty(device="cpu")


def allocator_peak(profiler: Any) -> int:
    """Of the bytes that the CPU allocator gave out, less those that came back."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("world_size", CASES)
def test_a_plan_is_what_ranks_measure(world_size: int) -> None:
    """Seen to fail when the sums of the last step were held through the next forward."""
    plans = [trace(step(world_size, *case)) for case in CASES[world_size]]
    results = run(measure, world_size, [found.peak.total() for found in plans], timeout=600.0)[0]
    for case, found, (peak, counts) in zip(CASES[world_size], plans, results, strict=True):
        assert found.peak.total() == pytest.approx(peak, rel=TOLERANCE), case
        counts.pop("broadcast", None)  # DDP lays its buckets out anew in the second forward
        assert {kind.replace("-", ""): n for kind, n in found.calls.items() if kind != "broadcast"} == counts, case
