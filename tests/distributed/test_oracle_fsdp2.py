"""FSDP2: updates are the oracle's on 1, 2 and 4 ranks, and in low precision no row puts in more than the bound."""

import functools
from typing import Any

import pytest
import torch

from tests.distributed.backends import (
    Task,
    Training,
    all_at_once,
    disagreements,
    excesses,
    fail_if_any,
    inaccuracies,
    one_by_one,
    played,
)
from tests.oracle import CASES, PRECISION_ROWS

# Where each of the awkward sizes bites: fewer rows than ranks, an empty rank, one rank.
ESSENTIAL: tuple[Task, ...] = (
    Training(case="decoder", backend="fsdp2", empty_last=True, optimizer="adamw", steps=3),
    Training(case="tied", backend="fsdp2", loss_reduction="sum", optimizer="momentum", steps=3),
    Training(case="partly frozen", backend="fsdp2", steps=2),
    Training(case="fewer rows than ranks", backend="fsdp2", microbatch=1, empty_last=True),
    Training(case="checkpointed", backend="fsdp2 root only"),
    Training(case="biases only", backend="fsdp2"),
    Training(case="inputs of rank 2", backend="fsdp2 root only", microbatch=9),
    Training(case="branches", backend="fsdp2"),
)
BOUND = 0.7  # below the norm of every probe row

PRECISION: tuple[Task, ...] = (
    *(one_by_one(rows, "fsdp2 bf16", BOUND) for rows in PRECISION_ROWS),
    one_by_one("decoder", "fsdp2", BOUND),
    one_by_one("leaves", "fsdp2 fp16", BOUND),
    *(all_at_once("leaves", "fsdp2 " + low, BOUND) for low in ("bf16", "fp16")),
    *(all_at_once("bare parameters", "fsdp2 " + low, BOUND) for low in ("bf16", "fp16")),
    *(all_at_once(rows, backend, BOUND) for rows in ("decoder", "tied") for backend in ("fsdp2 bf16", "fsdp2")),
    all_at_once("decoder", "fsdp2", BOUND, dtype=torch.bfloat16),
)
TASKS = {
    1: ESSENTIAL,
    2: (
        *(Training(case=name, backend="fsdp2", empty_last=True) for name in CASES),
        *(Training(case=name, backend="fsdp2 root only") for name in ("decoder", "tied", "reused")),
        Training(case="decoder", backend="fsdp2", sync_last_only=True, steps=2),
        *PRECISION,
    ),
    4: ESSENTIAL,
}
results = functools.cache(lambda world_size: played(world_size, TASKS[world_size]))


@pytest.mark.parametrize("world_size", TASKS)
def test_updates_are_the_oracles(world_size: int) -> None:
    fail_if_any(disagreements(results(world_size)))


def test_no_row_puts_in_more_than_the_bound() -> None:
    fail_if_any(excesses(results(2)))


def test_low_precision_stays_close_to_the_oracle() -> None:
    fail_if_any(inaccuracies(results(2)))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("backend", ["fsdp2", "fsdp2 root only"])
def test_every_case_on_every_world_size(world_size: int, backend: str) -> None:
    options: list[dict[str, Any]] = [
        {"optimizer": "adamw", "steps": 3, "microbatch": 1},
        {"optimizer": "momentum", "steps": 3, "microbatch": 3, "loss_reduction": "sum", "empty_last": True},
    ]
    tasks = [Training(case=name, backend=backend, **chosen) for name in CASES for chosen in options]
    fail_if_any(disagreements(played(world_size, tasks)))
