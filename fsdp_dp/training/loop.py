"""The training loop: logical batches in, optimizer steps out, one line of metrics each."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from fsdp_dp.averaging import WeightAverage
from fsdp_dp.checkpoint import Checkpoints
from fsdp_dp.data.corpus import Corpus
from fsdp_dp.data.rows import Row
from fsdp_dp.engine import PrivacyEngine
from fsdp_dp.ledger import Ledger
from fsdp_dp.models.objective import row_losses
from fsdp_dp.training.batches import make_batches
from fsdp_dp.training.budget import Budget
from fsdp_dp.training.diagnostics import Step
from fsdp_dp.training.evaluate import evenly_spaced, held_out_score
from fsdp_dp.training.interrupt import StopRequest
from fsdp_dp.training.schedule import learning_rate
from fsdp_dp.training.schema import TrainConfig
from fsdp_dp.training.world import World

if TYPE_CHECKING:
    # Its imports, TensorBoard above all, are for rank 0 alone.
    from fsdp_dp.training.metrics import RunLog


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a run is made of. `engine` is None without privacy; `budget`, `log` and `ledger` are None except on rank 0.

    `average` is None unless weights are averaged over releases.

    Steps are numbered over all starts of a run, and with privacy they are releases: `start` count as made, `last` may be.
    """

    config: TrainConfig
    corpus: Corpus
    world: World
    model: nn.Module
    optimizer: torch.optim.Optimizer
    engine: PrivacyEngine | None
    average: WeightAverage | None
    budget: Budget | None
    log: RunLog | None
    checkpoints: Checkpoints
    ledger: Ledger | None
    stop: StopRequest
    start: int
    last: int


def train(training: Training) -> int:
    """Train from step `start` to step `last`, or until a signal; the last step made, the same on every rank."""
    try:
        return _train(training)
    finally:
        gc.unfreeze()  # another trial of a sweep may follow in this process


def _train(training: Training) -> int:
    config, step = training.config, training.start
    batches, divisor = make_batches(
        training.corpus.train, config, training.world, training.engine, training.start, training.last
    )
    for step, batch in enumerate(batches, start=training.start + 1):
        hold_lease(training, step)
        set_learning_rate(training.optimizer, learning_rate(config.optimizer, step, config.steps))
        started = time.perf_counter()
        made = train_step(training, batch, divisor)
        stopping = report_step(training, step, made, started)
        if step == training.start + 2:
            gc.collect()
            gc.freeze()  # what has been made by now stays: without, the collector walks it again and again
        training.checkpoints.check()
        if stopping:
            break
        if step % config.checkpoint_every == 0 and step < training.last:
            training.checkpoints.save(step)
        if step % config.evaluate_every == 0 and step < config.steps:
            evaluate(training, step, config.evaluate_rows)
    return step


def hold_lease(training: Training, step: int) -> None:
    """On rank 0, see that release `step` is reserved; no other rank has its sums, and so a release, before rank 0 joins.

    Leases come with checkpoints, in the background: the disk is waited for only at the start, and where it is too slow.
    """
    if training.ledger is not None:
        training.ledger.hold(step)


def train_step(training: Training, batch: Iterable[Row], divisor: int) -> Step:
    """Forward and backward of every microbatch, then one optimizer step; what people are told of it.

    The sums over rows are un-noised, and take no part in the update.
    """
    device, score = training.world.device, training.corpus.score
    step = Step(training.world, training.engine)
    for inputs, targets in (map_to(device, microbatch) for microbatch in batch):
        logits = training.model(inputs)
        losses_B = row_losses(logits, targets)
        (losses_B.sum() / divisor).backward()
        # The engine's loader fills microbatches up with rows of zeros, which no text or image consists of.
        real_B = inputs.flatten(1).any(dim=1)
        step.count(score.totals(logits, targets, losses_B, real_B), real_B)
    training.optimizer.step()
    if training.average is not None:
        training.average.update()
    training.optimizer.zero_grad()
    return step


def map_to(device: torch.device, microbatch: Row) -> Row:
    inputs, targets = microbatch
    return inputs.to(device), targets.to(device)


def report_step(training: Training, step: int, made: Step, started: float) -> bool:
    """Gather what ranks have to say of a step, and log it on rank 0; whether any rank was asked to stop."""
    found, stopping = made.gather(started, training.stop.made)
    if training.log is not None:
        rate = training.optimizer.param_groups[0]["lr"]
        training.log.step(step, epsilon_after(training, step), rate, found)
    return stopping


def evaluate(training: Training, step: int, count: int | None = None) -> float | None:
    """The score on `count` held-out rows (default: all), logged on rank 0; None where diagnostics are off.

    It is that of the averaged weights where there are any.
    """
    if not training.config.diagnostics:
        return None
    corpus, size = training.corpus, len(training.corpus.held_out)
    indices = evenly_spaced(size, size if count is None else count)
    with nullcontext() if training.average is None else training.average.in_place():
        value = held_out_score(
            training.model, corpus.held_out, indices, corpus.score, training.config.microbatch_size, training.world
        )
    if training.log is not None:
        training.log.evaluation(step, epsilon_after(training, step), value, len(indices))
    return value


def epsilon_after(training: Training, step: int) -> float | None:
    """ε after `step` releases by rank 0's table; None without privacy."""
    if training.budget is None or training.ledger is None or training.ledger.standing is None:
        return None
    return training.budget.epsilon(min(training.ledger.standing.accounted(step), training.config.steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
