"""What the planner says of a case of the benchmark: memory and collectives of one rank, from fake ranks, without a GPU."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

from fsdp_dp.benchmark import meshes
from fsdp_dp.benchmark.cases import Case
from fsdp_dp.benchmark.models import Shape, Transformer
from fsdp_dp.models.config import GPTConfig
from fsdp_dp.planning.depth import predict
from fsdp_dp.planning.options import decoder
from fsdp_dp.planning.trace import Step
from fsdp_dp.training.schema import PrecisionConfig, ShardingConfig, TrainConfig
from fsdp_dp.training.world import World

GIB = 2**30
MOST_PROCESSES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkStep(Step):
    """A step of the benchmark's own transformer, where the planner has the application's."""

    shape: Shape

    def make_model(self) -> nn.Module:
        shape = dataclasses.replace(self.shape, layers=decoder(self.config).layers)
        return Transformer(shape, tied=False, checkpointing=False)

    def split(self, model: nn.Module, world: World) -> None:
        meshes.split_linears(model.blocks, world.tensor_mesh)

    def losses(self, model: nn.Module, tokens: Tensor) -> Tensor:
        return model(tokens, tokens)


def step_of(case: Case, gpus: int, *, on_gpu: bool) -> BenchmarkStep:
    """The case on so many ranks."""
    shape = case.shape
    model = GPTConfig(
        architecture="llama",
        layers=shape.layers,
        heads=shape.heads,
        width=shape.width,
        mlp_width=shape.hidden,
        block_size=shape.tokens,
        vocabulary_size=shape.vocabulary,
        norm="rms_norm",
    )
    config = TrainConfig(
        model=model,
        sharding=_config(case.sharding),
        precision=PrecisionConfig(compute="bf16"),
        device="auto" if on_gpu else "cpu",
    )
    return BenchmarkStep(
        config=config,
        world_size=gpus,
        side=case.side.removesuffix("-fsdp2"),
        microbatch_size=shape.rows,
        accumulates=case.microbatches > 1,
        shape=shape,
    )


def _config(sharding: meshes.Sharding) -> ShardingConfig:
    if sharding.tensor > 1:
        return ShardingConfig(strategy="tensor_parallel", tensor_parallel_size=sharding.tensor)
    if sharding.replicate > 1:
        return ShardingConfig(strategy="hybrid_shard_fsdp2", replicate_size=sharding.replicate)
    return ShardingConfig(strategy="fully_shard")


def predicted(step: BenchmarkStep) -> dict[str, Any]:
    """The peak in GiB, and the collectives of a microbatch with their bytes."""
    warnings.filterwarnings("ignore")
    found = predict(step)
    return {"GiB": found.peak.total() / GIB, "calls": dict(found.calls), "bytes": dict(found.sent)}


def predicted_or_why_not(step: BenchmarkStep) -> dict[str, Any]:
    """What was measured is not lost for a step that cannot be planned."""
    try:
        return predicted(step)
    except Exception as error:
        return {"GiB": None, "failed": f"{type(error).__name__}: {error}"}


def all_predicted(
    steps: Sequence[BenchmarkStep], one: Callable[[BenchmarkStep], dict[str, Any]] = predicted
) -> Iterator[dict[str, Any]]:
    """In order, as they come; each is a few seconds of one core."""
    processes = max(1, min(MOST_PROCESSES, os.cpu_count() or 1, len(steps)))
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(one, steps)
