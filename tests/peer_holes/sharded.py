"""What the holes need two ranks for: one start of processes for all of them, and each task's answer by name."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fsdp_dp.engine
from fsdp_dp import make_private
from tests.distributed.backends import (
    BACKENDS,
    EXPECTED_BATCH_SIZE,
    Revealed,
    Training,
    local,
    played,
    privacy_config,
    seeded,
    whole_parameters,
)
from tests.oracle import Case, Decoder, Gradients, bare_name

WIDE = Case(build=functools.partial(Decoder, hidden=401))  # 12 000 elements: enough for a standard deviation
SIGMA, BOUND, ROWS = 3.0, 0.5, 32


def is_bias(name: str) -> bool:
    return name.endswith("bias")


BIASES = Case(build=functools.partial(Decoder, hidden=401), trainable=is_bias)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The standard deviation of a release of no row, times the expected batch size; and how many elements it drew here."""

    backend: str
    case: Case = WIDE
    seed: int | None = None
    loss_reduction: str = "mean"
    sigma: float = SIGMA

    def run(self) -> dict[str, Any]:
        privacy = privacy_config(
            noise_multiplier=self.sigma, max_grad_norm=BOUND, seed=self.seed, loss_reduction=self.loss_reduction
        )
        model, engine = seeded(lambda: BACKENDS[self.backend](self.case.model(), privacy))
        revealed, (inputs, targets) = Revealed(model), self.case.batch()
        with engine.microbatch(torch.zeros(2, dtype=torch.bool)):
            self.case.row_losses(model(inputs[:2]), targets[:2]).mean().backward()
        with counted_draws() as drawn:
            released = torch.cat([g.flatten() for g in revealed.release().values()]) * EXPECTED_BATCH_SIZE
        engine.detach()
        of_ranks: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(of_ranks, sum(drawn))
        return {"std": float(released.std()), "elements": released.numel(), "drawn": of_ranks}


@contextlib.contextmanager
def counted_draws() -> Any:
    """How many elements every release draws noise for on this rank."""
    drawn: list[int] = []
    release = fsdp_dp.engine.privatize_all_

    def counting(segments: Any, *, later: Any, **options: Any) -> Any:
        segments = [*segments, *itertools.chain(*later)]
        drawn.append(sum(segment.count for segment in segments))
        return release(segments, **options)

    fsdp_dp.engine.privatize_all_ = counting
    try:
        yield drawn
    finally:
        fsdp_dp.engine.privatize_all_ = release


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Logical batches from the engine's loader: rows that each rank took, microbatches that it ran, ``[rank][step]``."""

    expected_batch_size: int
    steps: int
    seed: int | None = None

    def run(self) -> dict[str, list[list[Any]]]:
        drawn = {"sampling": "poisson", "dataset_size": ROWS, "target_delta": 1e-3}
        privacy = privacy_config(
            **drawn, expected_batch_size=self.expected_batch_size, seed=self.seed, max_grad_norm=BOUND
        )
        torch.manual_seed(0)
        model, engine = seeded(lambda: BACKENDS["fsdp2"](nn.Sequential(nn.Linear(ROWS, 3), nn.LayerNorm(3)), privacy))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rows, microbatches = [], []
        for logical_batch in engine.loader(list(torch.eye(ROWS)), microbatch_size=1, steps=self.steps):
            seen = []
            for x in logical_batch:
                seen.append(x)
                model(x).square().sum(1).mean().backward()
            optimizer.step()
            rows.append(torch.cat(seen).nonzero()[:, 1].tolist())
            microbatches.append(len(seen))
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (rows, microbatches))
        return {"rows": [of_rank[0] for of_rank in gathered], "microbatches": [of_rank[1] for of_rank in gathered]}


@dataclass(frozen=True, kw_only=True)
class Hybrid:
    """Two replicas, noised, with rows of their own: how far they are apart after three steps."""

    def run(self) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
        engine = make_private(model, privacy_config(noise_multiplier=1.0, max_grad_norm=BOUND))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for step in range(3):
            model(torch.full((2, 5), float(dist.get_rank() + step))).square().sum(1).mean().backward()
            optimizer.step()
        engine.detach()
        mine = torch.cat([local(p).detach().flatten() for p in model.parameters()])
        theirs = [torch.zeros_like(mine) for _ in range(2)]
        dist.all_gather(theirs, mine)
        return float((theirs[0] - theirs[1]).abs().max())


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A run on two ranks saved with `torch.distributed.checkpoint`: the folder's files as bytes, and what was in memory."""

    def run(self) -> tuple[dict[str, bytes], Gradients]:
        model, engine = BACKENDS["fsdp2"](
            WIDE.model(torch.float32), privacy_config(noise_multiplier=1.0, max_grad_norm=BOUND)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        inputs, targets = WIDE.batch()
        WIDE.row_losses(model(inputs), targets).mean().backward()
        optimizer.step()
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(folder)
        dcp.save({"model": model.state_dict(), "privacy": engine.state_dict()}, checkpoint_id=folder[0])
        files = {}
        for name in os.listdir(folder[0]):
            with open(os.path.join(folder[0], name), "rb") as file:
                files[name] = file.read()
        dist.barrier()
        shutil.rmtree(folder[0], ignore_errors=True)
        engine.detach()
        return files, whole_parameters(model)


TASKS: dict[str, Any] = {
    "tied, fsdp1": Training(case="tied", backend="fsdp1 root only"),
    "tied, fsdp2": Training(case="tied", backend="fsdp2 root only"),
    "sum, fsdp1": Training(case="decoder", backend="fsdp1", loss_reduction="sum"),
    "sum, fsdp2": Training(case="decoder", backend="fsdp2", loss_reduction="sum"),
    "empty rank": Training(case="decoder", backend="fsdp2", empty_last=True),
    "root parameter": Training(case="bare parameters", backend="fsdp2 root only"),
    "checkpointed": Training(case="checkpointed", backend="fsdp2"),
    "biases, fsdp1": Training(case="biases only", backend="fsdp1"),
    "biases, fsdp2": Training(case="biases only", backend="fsdp2"),
    "noise": Noise(backend="fsdp2"),
    "noise, sum": Noise(backend="fsdp2", loss_reduction="sum"),
    "noise, seed": Noise(backend="fsdp2", seed=3),
    "noise of biases, fsdp1": Noise(backend="fsdp1", case=BIASES, sigma=1000.0),
    "noise of biases, fsdp2": Noise(backend="fsdp2", case=BIASES, sigma=1000.0),
    "rare rows": Draws(expected_batch_size=1, steps=12),
    "same seed": Draws(expected_batch_size=8, steps=40, seed=7),
    "hybrid": Hybrid(),
    "saved": Saved(),
}


@functools.cache
def results() -> dict[str, Any]:
    """The answer of every task."""
    found = played(2, list(TASKS.values()))
    return {name: found[task] for name, task in TASKS.items()}


def training_error(name: str) -> float:
    """How far a training of `TASKS` is from the oracle."""
    return float(TASKS[name].error(results()[name]))


def load(files: dict[str, bytes], state: dict[str, Any]) -> None:
    """Read a saved folder into `state` in this process."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(state, checkpoint_id=folder)


def names(model: nn.Module) -> dict[str, Tensor]:
    return {bare_name(name): p for name, p in model.named_parameters()}
