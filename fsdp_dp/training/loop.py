"""The training loop: logical batches in, optimizer steps out, one line of metrics each."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fsdp_dp.checkpoint import Checkpoints
from fsdp_dp.data.corpus import Corpus
from fsdp_dp.engine import PrivacyEngine
from fsdp_dp.ledger import Ledger
from fsdp_dp.models.objective import IGNORED, row_losses
from fsdp_dp.training.batches import Microbatch, make_batches
from fsdp_dp.training.budget import Budget
from fsdp_dp.training.evaluate import bits_per_byte, evenly_spaced, loss_totals
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

    Steps are numbered over all starts of a run, and with privacy they are releases: `start` count as made, `last` may be.
    """

    config: TrainConfig
    corpus: Corpus
    world: World
    model: nn.Module
    optimizer: torch.optim.Optimizer
    engine: PrivacyEngine | None
    budget: Budget | None
    log: RunLog | None
    checkpoints: Checkpoints
    ledger: Ledger | None
    stop: StopRequest
    start: int
    last: int


def train(training: Training) -> int:
    """Train from step `start` to step `last`, or until a signal; the last step made, the same on every rank."""
    config, step = training.config, training.start
    batches, divisor = make_batches(
        training.corpus.train, config, training.world, training.engine, training.start, training.last
    )
    for step, batch in enumerate(batches, start=training.start + 1):
        hold_lease(training, step)
        set_learning_rate(training.optimizer, learning_rate(config.optimizer, step, config.steps))
        started = time.perf_counter()
        totals = train_step(training, batch, divisor)
        stopping = report_step(training, step, totals, started)
        training.checkpoints.check()
        if stopping:
            break
        if step % config.checkpoint_every == 0 and step < training.last:
            training.checkpoints.save(step)
        if step % config.evaluate_every == 0 and step < config.steps:
            evaluate(training, step, evenly_spaced(training.corpus.held_out, config.evaluate_rows))
    return step


def hold_lease(training: Training, step: int) -> None:
    """On rank 0, see that release `step` is reserved; no other rank has its sums, and so a release, before rank 0 joins.

    Leases come with checkpoints, in the background: the disk is waited for only at the start, and where it is too slow.
    """
    if training.ledger is not None:
        training.ledger.hold(step)


def train_step(training: Training, batch: Iterable[Microbatch], divisor: int) -> Tensor:
    """Forward and backward of every microbatch, then one optimizer step.

    Returns this rank's [nats, predicted bytes, rows, rows with padding].

    The sums over rows are for people: they are un-noised, and take no part in the update.
    """
    device = training.world.device
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    for inputs, targets in (map_to(device, microbatch) for microbatch in batch):
        losses_B = row_losses(training.model(inputs), targets)
        (losses_B.sum() / divisor).backward()
        # The engine's loader fills microbatches up with rows of zeros, which no text consists of.
        real_B = inputs.any(dim=1)
        real_targets = targets.masked_fill(~real_B[:, None], IGNORED)
        totals[:2] += loss_totals(losses_B.where(real_B, 0.0), real_targets)
        totals[2] += real_B.sum()
        totals[3] += len(real_B)
    training.optimizer.step()
    training.optimizer.zero_grad()
    return totals


def map_to(device: torch.device, microbatch: Microbatch) -> Microbatch:
    inputs, targets = microbatch
    return inputs.to(device), targets.to(device)


def report_step(training: Training, step: int, totals: Tensor, started: float) -> bool:
    """Sum the step's totals over ranks and log them on rank 0; whether any rank was asked to stop."""
    world = training.world
    asked = totals.new_tensor([training.stop.made])
    nats, count, rows, padded, stopping = world.sum(torch.cat([totals, asked]))
    seconds = time.perf_counter() - started
    if training.log is not None:
        unprotected = {
            # An empty Poisson draw has no loss.
            "training_bits_per_byte": nats / count / math.log(2) if count else math.nan,
            "rows_per_second": rows * world.data_size / world.size / seconds,
            "useful_rows": rows / padded,
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
    if training.budget is None or training.ledger is None or training.ledger.standing is None:
        return None
    return training.budget.epsilon(min(training.ledger.standing.accounted(step), training.config.steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
