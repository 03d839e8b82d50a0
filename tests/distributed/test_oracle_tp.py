"""Tensor parallelism under FSDP2: a row's gradient is split over tensor ranks, and clipped as one."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from fsdp_dp import make_private
from fsdp_dp.errors import UnsupportedModelError
from tests.distributed.backends import (
    BACKENDS,
    OPTIMIZERS,
    Task,
    Training,
    all_at_once,
    disagreements,
    excesses,
    fail_if_any,
    inaccuracies,
    local,
    one_by_one,
    played,
    privacy_config,
    quiet_torch,
)
from tests.distributed.harness import run
from tests.oracle import CASES, median_norm, share

# Models with a Block, the module that is split. 37 hidden units over 2 ranks are 19 and 18, over 4 ranks 10, 9, 9, 9.
SPLIT = ("decoder", "tied", "checkpointed", "partly frozen", "biases only", "reused", "unit called twice")
TASKS: dict[int, tuple[Task, ...]] = {
    2: (
        Training(case="decoder", backend="tp 1x2", optimizer="adamw", steps=3),
        Training(case="tied", backend="tp 1x2"),
        Training(case="decoder", backend="tp 2x1", empty_last=True),
        Training(case="decoder", backend="tp alone"),
        Training(case="four positions", backend="sp alone", optimizer="momentum", steps=2),
    ),
    4: (
        *(Training(case=name, backend="tp 2x2") for name in SPLIT),
        Training(case="decoder", backend="tp 2x2", empty_last=True, optimizer="adamw", steps=3),
        Training(case="tied", backend="tp 2x2", loss_reduction="sum", optimizer="momentum", steps=3),
        Training(case="even decoder", backend="tp 2x2 split head", empty_last=True),
        Training(case="four positions", backend="sp 2x2", empty_last=True, optimizer="adamw", steps=2),
        Training(case="four positions, tied", backend="sp 2x2", loss_reduction="sum"),
        Training(case="four positions", backend="sp 2x2 loss parallel"),
        one_by_one("decoder", "tp 2x2", 0.7),
        *(all_at_once(rows, "tp 2x2", 0.7) for rows in ("decoder", "tied")),
    ),
}
results = functools.cache(lambda world_size: played(world_size, TASKS[world_size]))


@pytest.mark.parametrize("world_size", TASKS)
def test_updates_are_the_oracles(world_size: int) -> None:
    fail_if_any(disagreements(results(world_size)))


def test_no_row_puts_in_more_than_the_bound() -> None:
    fail_if_any(excesses(results(4)))


def test_low_precision_stays_close_to_the_oracle() -> None:
    fail_if_any(inaccuracies(results(4)))


@pytest.mark.slow
def test_three_mesh_dimensions() -> None:
    """Replicas of shards of tensor-parallel parts, on eight ranks."""
    tasks = [
        Training(case=case, backend=backend, empty_last=True, optimizer="momentum", steps=2)
        for case, backend in (("decoder", "tp 2x2x2"), ("partly frozen", "tp 2x2x2"), ("four positions", "sp 2x2x2"))
    ]
    fail_if_any(disagreements(played(8, tasks)))


@pytest.mark.slow
@pytest.mark.parametrize("case", SPLIT)
def test_every_case_with_every_option(case: str) -> None:
    options: list[dict[str, Any]] = [
        {"optimizer": "adamw", "steps": 3, "microbatch": 1},
        {"optimizer": "momentum", "steps": 3, "microbatch": 3, "loss_reduction": "sum", "empty_last": True},
    ]
    for world_size, backends in ((2, ("tp 1x2", "tp 2x1")), (4, ("tp 2x2",))):
        tasks = [Training(case=case, backend=backend, **chosen) for backend in backends for chosen in options]
        fail_if_any(disagreements(played(world_size, tasks)))


def norms_and_replicated_parameters(rank: int, world_size: int) -> tuple[int, torch.Tensor, dict[str, torch.Tensor]]:
    """A data rank, its rows' norms, and the parameters that all of its tensor ranks hold, after two releases."""
    case, (inputs, targets) = CASES["decoder"], CASES["decoder"].batch()
    with quiet_torch():
        model, engine = BACKENDS["tp 2x2"](case.model(), privacy_config(max_grad_norm=median_norm("decoder")))
        optimizer = OPTIMIZERS["momentum"](model.parameters())
        norms = []
        for _ in range(2):
            for numbers, mask in share(range(case.rows), rank=engine.model.data_rank, size=2, microbatch=3):
                with engine.microbatch(mask):
                    case.row_losses(model(inputs[numbers]), targets[numbers]).mean().backward()
                norms.append(engine.per_sample_norms)
            optimizer.step()
        replicated = {
            n: local(p) for n, p in model.named_parameters() if isinstance(p, DTensor) and p.device_mesh.ndim == 1
        }
    assert dist.get_world_size() == world_size
    return engine.model.data_rank, torch.cat(norms), replicated


def test_tensor_ranks_clip_a_row_by_the_same_weight() -> None:
    """To the bit: else replicated parameters would drift apart, each rank's own way."""
    answers = run(norms_and_replicated_parameters, 4)
    for data_rank in (0, 1):
        (first, second) = [(norms, replicated) for rank, norms, replicated in answers if rank == data_rank]
        assert torch.equal(first[0], second[0])
        assert any("norm1" in name for name in first[1]) and any("token" in name for name in first[1])
        assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


class HeadNorms(nn.Module):
    """A norm on the heads of one rank: replicated parameters, but each rank's gradient is a part of a row's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 8), nn.LayerNorm(2), nn.Linear(8, 1)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x_BTD).unflatten(2, (-1, 2))).flatten(2))


def refusals(rank: int, world_size: int) -> dict[str, str]:
    """What is said of plans whose gradients fit none of the known patterns."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world_size,))
    norm_first = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 1))
    plans: dict[str, tuple[nn.Module, dict[str, ParallelStyle]]] = {
        "norm on own heads": (HeadNorms(), {"up": ColwiseParallel(), "down": RowwiseParallel()}),
        "rows split": (norm_first, {"0": SequenceParallel(sequence_dim=0, use_local_output=True)}),
    }
    found = {}
    for name, (model, plan) in plans.items():
        make_private(parallelize_module(model, mesh, plan), privacy_config(max_grad_norm=1.0))
        found[name] = "accepted"
        try:
            model(torch.randn(2, 3, 4)).sum((1, 2)).mean().backward()
        except UnsupportedModelError as error:
            found[name] = str(error)
    return found


def test_plans_that_fit_no_pattern_are_refused() -> None:
    """The first seen to be accepted, with half of its norm, without the comparison over ranks."""
    for found in run(refusals, 2):
        assert "differ over its ranks" in found["norm on own heads"]
        assert "ranks would hold different rows" in found["rows split"]
