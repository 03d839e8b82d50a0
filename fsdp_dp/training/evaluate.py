"""The held-out score: each row counted once, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fsdp_dp.data.rows import Rows
from fsdp_dp.models.objective import Score, row_losses
from fsdp_dp.training.world import World


@torch.no_grad()
def held_out_score(
    model: nn.Module, dataset: Rows, indices: Tensor, score: Score, microbatch_size: int, world: World
) -> float:
    """The score on the rows that `indices` [N] name, over all ranks.

    Every rank runs the same number of forwards, for FSDP gathers parameters in each: a rank without rows left runs
    one on rows that do not count.
    """
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)
    for part, counts in shares(indices, microbatch_size, world):
        inputs, targets = (tensor.to(world.device) for tensor in dataset.batch(part))
        logits = model(inputs)
        counts_B = torch.full((len(part),), counts, device=world.device)
        totals += score.totals(logits, targets, row_losses(logits, targets), counts_B)
    if isinstance(model, FSDPModule):
        # A forward without a backward leaves the root gathered.
        model.reshard()
    model.train()
    total, count = world.sum(totals)
    return total / count


def shares(indices: Tensor, microbatch_size: int, world: World) -> Iterator[tuple[Tensor, bool]]:
    """This rank's microbatches of `indices`, and whether each counts; as many on every rank."""
    parts = indices.split(microbatch_size)
    for start in range(0, len(parts), world.data_size):
        mine = start + world.data_rank
        yield parts[min(mine, len(parts) - 1)], mine < len(parts)


def evenly_spaced(size: int, count: int) -> Tensor:
    """`count` of the numbers below `size`, or all of them if there are fewer; the same at every call."""
    return torch.arange(size) if count >= size else torch.linspace(0, size - 1, count).long()
