"""Where a step's microbatches come from: tensors that are there, or a loader, as in a training program.

Through a loader (``--loader``) private sides have `PrivacyEngine.loader`: Poisson draws of as many rows as plain training has
in a step on average, in microbatches of the same shape, padded. Plain training has torch's ``DataLoader`` over random rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fsdp_dp.benchmark.cases import Case
from fsdp_dp.benchmark.models import Shape, batch
from fsdp_dp.engine import PrivacyEngine

Microbatch = tuple[Tensor, Tensor]
DATASET_SIZE = 10**6
_WORKERS = 2


class RandomRows(Dataset[Microbatch]):
    """Rows of a shape, each made of its number; none is all zeros, as padding is."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape

    def __len__(self) -> int:
        return DATASET_SIZE

    def __getitem__(self, index: int) -> Microbatch:
        inputs, targets = batch(self._shape, 1, index, torch.device("cpu"))
        return inputs[0], targets[0]


class Feed:
    """The microbatches of one step after another.

    Attributes:
        rows: that a step of this rank had, padding left out; one number a step.
        places: the same with padding.
    """

    def __init__(self, case: Case, device: torch.device, rank: int) -> None:
        self._case, self._device = case, device
        self._first = 100 * rank
        self.rows: list[int] = []
        self.places: list[int] = []

    def batches(self, engine: PrivacyEngine | None) -> Iterator[Iterable[Microbatch]]:
        """Logical batches without end: of the private side whose engine this is, or of plain training."""
        case = self._case
        if not case.loader:
            counts = range(self._first, self._first + case.microbatches)
            return itertools.repeat([batch(case.shape, case.shape.rows, i, self._device) for i in counts])
        workers = _WORKERS if self._device.type == "cuda" else 0
        pinned = self._device.type == "cuda"
        if engine is not None:
            loader = engine.loader(RandomRows(case.shape), case.shape.rows, num_workers=workers, pin_memory=pinned)
            return (self._counted(logical_batch) for logical_batch in loader)
        endless = DataLoader(
            RandomRows(case.shape), batch_size=case.shape.rows, num_workers=workers, pin_memory=pinned,
            sampler=_Endless(self._first),
        )  # fmt: skip
        microbatches = iter(endless)
        return (self._counted(itertools.islice(microbatches, case.microbatches)) for _ in itertools.count())

    def _counted(self, microbatches: Iterable[Microbatch]) -> Iterator[Microbatch]:
        self.rows.append(0)
        self.places.append(0)
        for inputs, targets in microbatches:
            self.rows[-1] += int((inputs.flatten(1) != 0).any(1).sum())
            self.places[-1] += len(inputs)
            yield inputs.to(self._device, non_blocking=True), targets.to(self._device, non_blocking=True)


class _Endless(torch.utils.data.Sampler[int]):
    """Uniform row numbers without end."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            yield from torch.randint(DATASET_SIZE, (1024,), generator=generator).tolist()
