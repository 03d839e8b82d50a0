"""Logical batches: each is an iterable of microbatches, and each ends in one optimizer step.

Private training takes them from the engine's loader, which draws rows as the accountant assumes. Plain training, here,
shuffles: the customary way, for an honest comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from fsdp_dp.data.rows import Row, Rows
from fsdp_dp.engine import PrivacyEngine
from fsdp_dp.training.schema import TrainConfig
from fsdp_dp.training.world import World


class ShuffledBatches:
    """Plain training's batches: permutations of the rows one after the other, cut into batches, split over the ranks.

    Each rank gets `rows` = batch_size // data ranks of a batch, so all take part in the same number of microbatches.
    """

    def __init__(self, dataset: Rows, config: TrainConfig, world: World, start: int, last: int) -> None:
        self.dataset, self.config, self.world = dataset, config, world
        self.start, self.last = start, last
        self.rows = config.batch_size // world.data_size

    def __iter__(self) -> Iterator[Iterator[Row]]:
        order = endless_permutations(len(self.dataset), self.config.seed)
        for step in range(self.last):
            batch = torch.tensor([next(order) for _ in range(self.config.batch_size)])
            if step < self.start:
                continue
            mine = batch[self.world.data_rank :: self.world.data_size][: self.rows]
            yield (self.dataset.batch(part) for part in mine.split(self.config.microbatch_size))


def endless_permutations(size: int, seed: int) -> Iterator[int]:
    """Indices below `size`, each once an epoch, in a new order every epoch; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(size, generator=generator).tolist()


def make_batches(
    dataset: Rows, config: TrainConfig, world: World, engine: PrivacyEngine | None, start: int, last: int
) -> tuple[Iterable[Iterable[Row]], int]:
    """The logical batches of the steps after `start` up to `last`, and what to divide a microbatch's summed loss by.

    Plain: the rank's rows of a batch, since FSDP averages over ranks. Private: the rows of a microbatch, padding
    included, which the engine knows as `loss_reduction="mean"`; it divides by the expected batch size itself.
    """
    if engine is None:
        plain = ShuffledBatches(dataset, config, world, start, last)
        return plain, plain.rows
    return engine.loader(dataset, microbatch_size=config.microbatch_size, steps=last - start), config.microbatch_size
