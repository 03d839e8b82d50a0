"""The training loop: logical batches in, optimizer steps out, one line of metrics each."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fsdp_dp.data.corpus import Corpus
from fsdp_dp.engine import PrivacyEngine
from fsdp_dp.models.objective import IGNORED, row_losses
from fsdp_dp.training.batches import Microbatch, make_batches
from fsdp_dp.training.budget import Budget
from fsdp_dp.training.evaluate import bits_per_byte, evenly_spaced, loss_totals
from fsdp_dp.training.interrupt import StopRequest, stop_on_ctrl_c
from fsdp_dp.training.schedule import learning_rate
from fsdp_dp.training.schema import TrainConfig
from fsdp_dp.training.world import World

if TYPE_CHECKING:
    # Its imports, TensorBoard above all, are for rank 0 alone.
    from fsdp_dp.training.metrics import RunLog


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a run is made of. `engine` is None without privacy; `budget` and `log` are None except on rank 0."""

    config: TrainConfig
    corpus: Corpus
    world: World
    model: nn.Module
    optimizer: torch.optim.Optimizer
    engine: PrivacyEngine | None
    budget: Budget | None
    log: RunLog | None


def train(training: Training) -> int:
    """Train for `config.steps` steps, or until Ctrl-C; the number of steps made, the same on every rank."""
    config = training.config
    batches, divisor = make_batches(training.corpus.train, config, training.world, training.engine)
    step = 0
    with stop_on_ctrl_c() as stop:
        for step, batch in enumerate(batches, start=1):
            set_learning_rate(training.optimizer, learning_rate(config.optimizer, step, config.steps))
            started = time.perf_counter()
            totals = train_step(training, batch, divisor)
            stopping = report_step(training, step, totals, stop, started)
            if step % config.evaluate_every == 0 and step < config.steps:
                evaluate(training, step, evenly_spaced(training.corpus.held_out, config.evaluate_rows))
            if stopping:
                break
    return step


def train_step(training: Training, batch: Iterable[Microbatch], divisor: int) -> Tensor:
    """Forward and backward of every microbatch, then one optimizer step: this rank's [nats, predicted bytes, rows].

    The sums over rows are for people: they are un-noised, and take no part in the update.
    """
    device = training.world.device
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for inputs, targets in (map_to(device, microbatch) for microbatch in batch):
        losses_B = row_losses(training.model(inputs), targets)
        (losses_B.sum() / divisor).backward()
        # The engine's loader fills microbatches up with rows of zeros, which no text consists of.
        real_B = inputs.any(dim=1)
        real_targets = targets.masked_fill(~real_B[:, None], IGNORED)
        totals[:2] += loss_totals(losses_B.where(real_B, 0.0), real_targets)
        totals[2] += real_B.sum()
    training.optimizer.step()
    training.optimizer.zero_grad()
    return totals


def map_to(device: torch.device, microbatch: Microbatch) -> Microbatch:
    inputs, targets = microbatch
    return inputs.to(device), targets.to(device)


def report_step(training: Training, step: int, totals: Tensor, stop: StopRequest, started: float) -> bool:
    """Sum the step's totals over ranks and log them on rank 0; whether any rank was asked to stop."""
    world = training.world
    nats, count, rows, stopping = world.sum(torch.cat([totals, totals.new_tensor([stop.made])]))
    seconds = time.perf_counter() - started
    if training.log is not None:
        unprotected = {
            # An empty Poisson draw has no loss.
            "training_bits_per_byte": nats / count / math.log(2) if count else math.nan,
            "rows_per_second": rows * world.data_size / world.size / seconds,
        }
        rate = training.optimizer.param_groups[0]["lr"]
        training.log.step(step, epsilon_after(training, step), rate, unprotected)
    return stopping > 0


def evaluate(training: Training, step: int, rows: Tensor) -> float:
    """Held-out bits per byte on `rows`, logged on rank 0."""
    bits = bits_per_byte(training.model, rows, training.config.microbatch_size, training.world)
    if training.log is not None:
        training.log.evaluation(step, epsilon_after(training, step), bits, len(rows))
    return bits


def epsilon_after(training: Training, step: int) -> float | None:
    """ε after `step` releases by rank 0's table; None without privacy."""
    return None if training.budget is None else training.budget.epsilon(step)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
