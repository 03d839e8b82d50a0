"""What is measured: for each number of GPUs and sharding one start of torchrun, with weak and strong scaling in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from fsdp_dp.benchmark import cases, meshes

PLAIN = "plain-fsdp2"
PRIVATE = ("flat", "block", "layer")
SHARDINGS = ("full_shard", "hsdp", "tp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """One start of torchrun. Every GPU has the same rows in a microbatch; a step has so many of these.

    ``weak``: microbatches of a step, however many GPUs there are. ``strong``: microbatches of a step over all
    data-parallel ranks together, so that twice the GPUs have half of them each.
    """

    gpus: int
    sharding: str
    models: tuple[str, ...]
    sides: tuple[str, ...]
    weak: int
    strong: int

    @property
    def microbatches(self) -> dict[str, int]:
        ranks = meshes.parse(self.sharding, self.gpus).data_ranks
        return {"weak": self.weak, "strong": max(1, self.strong // ranks)}

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.microbatches.values()))

    def texts(self) -> list[str]:
        """As the benchmark takes them."""
        return [f"{model}:{','.join(self.sides)}" for model in self.models]

    def cases(self) -> Iterator[cases.Case]:
        """In the order in which the benchmark measures them."""
        sharding = meshes.parse(self.sharding, self.gpus)
        for count in self.counts:
            for text in self.texts():
                yield from cases.parse(text, microbatches=count, checkpointing=False, sharding=sharding)


def shardings(gpus: int, kinds: Sequence[str]) -> Iterator[str]:
    """Those of these kinds that so many GPUs can have, two copies and two tensor ranks at most."""
    if "full_shard" in kinds:
        yield "full_shard"
    if "hsdp" in kinds and gpus >= 4:
        yield f"hsdp=2x{gpus // 2}"
    if "tp" in kinds and gpus >= 2:
        yield "tp=2"


def launches(
    sizes: Sequence[int], kinds: Sequence[str], models: Sequence[str], sides: Sequence[str], weak: int, strong: int
) -> list[Launch]:
    """Plain training first, since the others are compared with it."""
    return [
        Launch(
            gpus=gpus,
            sharding=sharding,
            models=tuple(models),
            sides=(PLAIN, *(side for side in sides if side != PLAIN)),
            weak=weak,
            strong=strong,
        )
        for gpus in sizes
        for sharding in shardings(gpus, kinds)
    ]
