"""Held-out bits per byte: each row counted once, whatever the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fsdp_dp.data.packing import RowDataset, split_row
from fsdp_dp.models.objective import IGNORED, row_losses
from fsdp_dp.training.world import World


@torch.no_grad()
def bits_per_byte(model: nn.Module, rows: Tensor, microbatch_size: int, world: World) -> float:
    """The mean cross entropy in bits of the bytes that `rows` (uint8 [N, T + 1]) ask to predict, over all ranks.

    Every rank runs the same number of forwards, for FSDP gathers parameters in each: a rank without rows left runs
    one on rows that do not count.
    """
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)
    for part, counts in shares(rows, microbatch_size, world):
        inputs, targets = (tensor.to(world.device) for tensor in split_row(part))
        losses_B = row_losses(model(inputs), targets)
        if counts:
            totals += loss_totals(losses_B, targets)
    if isinstance(model, FSDPModule):
        # A forward without a backward leaves the root gathered.
        model.reshard()
    model.train()
    nats, count = world.sum(totals)
    return nats / count / math.log(2)


def loss_totals(losses_B: Tensor, targets_BT: Tensor) -> Tensor:
    """[nats, predicted bytes] of a microbatch, float64 on its device, from the rows' losses per position."""
    nats = losses_B.detach().double().sum() * targets_BT.shape[1]
    return torch.stack([nats, (targets_BT != IGNORED).sum().double()])


def shares(rows: Tensor, microbatch_size: int, world: World) -> Iterator[tuple[Tensor, bool]]:
    """This rank's microbatches of `rows`, and whether each counts; as many on every rank."""
    parts = rows.split(microbatch_size)
    for start in range(0, len(parts), world.data_size):
        mine = start + world.data_rank
        yield parts[min(mine, len(parts) - 1)], mine < len(parts)


def evenly_spaced(dataset: RowDataset, count: int) -> Tensor:
    """`count` rows spread over the data set, or all of them if there are fewer; the same at every call."""
    if count >= len(dataset):
        return dataset.rows
    return dataset.rows[torch.linspace(0, len(dataset) - 1, count).long()]
