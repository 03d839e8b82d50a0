"""Averaged weights are those of a loop over whole parameters, on every sharding; training does not notice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fsdp_dp import PrivacyError
from fsdp_dp.averaging import WeightAverage
from fsdp_dp.checkpoint import Checkpoints
from fsdp_dp.export import model_weights
from tests.distributed.backends import whole_parameters
from tests.distributed.harness import run
from tests.distributed.test_checkpoint import Run, quiet, start
from tests.oracle import Gradients

BACKENDS = (
    "fsdp1",
    "fsdp2",
    "fsdp1 of torch",
    "fsdp1 shard_grad_op",
    "fsdp1 no_shard",
    "tp 1x2",
    "ddp",
    "fsdp2 hybrid",
)
CASE, DECAY, STEPS = (
    "partly frozen",
    0.25,
    4,
)  # the first updates are of the warm-up: 2 / 11, 3 / 12, and then the decay


class Averaging(Run):
    """A `Run` from a folder's checkpoint, whose weights are averaged."""

    def __init__(self, folder: Path, backend: str) -> None:
        super().__init__(folder, CASE, "sgd", backend)
        self.average = WeightAverage(self.engine, DECAY)
        self.checkpoints = Checkpoints(folder, self.model, self.optimizer, self.engine, average=self.average)
        assert self.checkpoints.load() is not None

    def train(self, first: int) -> list[Gradients]:
        """The weights after every step."""
        seen = []
        for number in range(first, first + STEPS):
            self.step(number)
            self.average.update()
            self.optimizer.zero_grad()
            seen.append(whole_parameters(self.model))
            self.evaluate()
        return seen

    def evaluate(self) -> Gradients:
        """The averaged weights, which a forward without gradients has just used."""
        with self.average.in_place():
            with torch.no_grad():
                self.model(self.case.batch()[0][:1])
            found = whole_parameters(self.model)
        return found


def averaged(average: Gradients, weights: list[Gradients], updates: int) -> Gradients:
    """The definition, of whole parameters."""
    for n, now in enumerate(weights, start=updates + 1):
        kept = min(DECAY, (1 + n) / (10 + n))
        average = {name: kept * x + (1 - kept) * now[name] for name, x in average.items()}
    return average


def assert_close(found: Gradients, expected: Gradients) -> None:
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-12, atol=1e-12, msg=name)


def check(rank: int, world_size: int, folder: Path) -> None:
    with quiet():
        for backend in BACKENDS:
            if rank == 0:
                shutil.copytree(folder / "start", folder / backend)
            dist.barrier()
            check_backend(rank, folder / backend, backend)


def check_backend(rank: int, folder: Path, backend: str) -> None:
    """Seen to fail where `in_place` leaves units gathered, where weights are not put back, and where a load forgets."""
    first = Averaging(folder, backend)
    before = whole_parameters(first.model)
    seen = first.train(1)
    assert max((seen[-1][name] - x).abs().max() for name, x in before.items()) > 1e-3
    expected = averaged(before, seen, 0)
    assert_close(first.evaluate(), expected)
    assert_close(whole_parameters(first.model), seen[-1])
    first.checkpoints.save(1 + STEPS)
    first.train(1 + STEPS)  # while it is written
    first.checkpoints.wait()
    first.engine.detach()
    again = Averaging(folder, backend)
    assert again.average.updates == STEPS
    assert_close(again.evaluate(), expected)
    assert_close(whole_parameters(again.model), seen[-1])
    expected = averaged(expected, again.train(1 + STEPS), STEPS)
    assert_close(again.evaluate(), expected)
    again.engine.detach()
    if rank == 0:
        saved = folder / f"step-{1 + STEPS:08d}"
        plain, average = model_weights(saved), model_weights(saved, averaged=True)
        assert_close({n: x.double() for n, x in plain.items()}, {n: x for n, x in seen[-1].items() if n in plain})
        assert plain.keys() == average.keys()


@pytest.mark.parametrize("world_size", [2])
def test_averages_are_those_of_whole_parameters(tmp_path: Path, world_size: int) -> None:
    start(tmp_path / "start", CASE, "sgd")  # without an average, which begins with the weights there
    run(check, world_size, tmp_path, timeout=300.0)


def test_nothing_is_trained_within_a_block(tmp_path: Path) -> None:
    start(tmp_path, CASE, "sgd")
    one = Averaging(tmp_path, "plain")
    with one.average.in_place():
        with pytest.raises(PrivacyError, match=r"update within in_place\(\)"):
            one.average.update()
        with pytest.raises(PrivacyError, match=r"in_place within in_place\(\)"), one.average.in_place():
            pass
    with pytest.raises(ValueError, match="decay must be"):
        WeightAverage(one.engine, 1.0)
