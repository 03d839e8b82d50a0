"""Two GPUs, NCCL: updates under every strategy are the oracle's, as on gloo, and so is offloading to the CPU."""

from __future__ import annotations

import functools

import pytest

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

pytestmark = pytest.mark.gpu(count=2)

EXACT = (
    "fsdp1", "fsdp1 shard_grad_op", "fsdp1 no_shard", "fsdp1 offload", "fsdp1 nested", "fsdp1 of meta", "fsdp2",
    "fsdp2 not resharded", "fsdp2 offload", "fsdp2 of meta", "ddp", "zero1", "tp 1x2", "tp 2x1",
)  # fmt: skip
MIXED = ("fsdp1 bf16", "fsdp2 bf16")
# Tensor parallel alone is left to CPUs: torch 2.11's optimizers refuse parameters on CUDA of which only some are split.
TASKS: tuple[Task, ...] = (
    *(Training(case="decoder", backend=backend, empty_last=True, optimizer="adamw", steps=2) for backend in EXACT),
    *(Training(case="tied", backend=backend, loss_reduction="sum") for backend in ("fsdp1", "fsdp2", "tp 1x2")),
    *(Training(case="decoder", backend=backend, dedicated=True) for backend in ("fsdp1", "fsdp2")),
    *(all_at_once("decoder", backend, 0.7) for backend in ("fsdp1", "fsdp2", *MIXED)),
    *(one_by_one("decoder", backend, 0.7) for backend in MIXED),
)
results = functools.cache(lambda: played(2, TASKS, backend="cpu:gloo,cuda:nccl"))


def test_updates_are_the_oracles() -> None:
    fail_if_any(disagreements(results()))


def test_no_row_puts_in_more_than_the_bound() -> None:
    fail_if_any(excesses(results()))


def test_low_precision_stays_close_to_the_oracle() -> None:
    fail_if_any(inaccuracies(results()))
