"""Groups that finish inside backward, between FSDP's own collectives, where ranks use different parts of the model.

A rank that reduces a unit later than its peers keeps them waiting inside backward, and they keep it waiting for the
all-gathers that come next (rule 12). One spawn of two ranks.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fsdp_dp.sharding.sums import MAX_UNDER_WAY
from tests.distributed.backends import (
    BACKENDS,
    EXPECTED_BATCH_SIZE,
    TOLERANCE,
    Revealed,
    fail_if_any,
    play,
    privacy_config,
)
from tests.distributed.harness import run
from tests.oracle import Groups, Unit, is_unit, relative_error, row_gradients, square_losses, trainable

WIDTH, ROWS, UNITS, MICROBATCHES = 5, 4, 6, 2  # more units than sums that may be under way


class Collectives(TorchDispatchMode):
    """What this rank issues, in order: kind and size."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = func._opname.replace("_", "")
        if func.namespace in ("c10d", "_c10d_functional") and ("gather" in kind or "reduce" in kind):
            self.seen.append(
                (kind, sum(x.numel() for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)))
            )
        return func(*args, **(kwargs or {}))


class Forked(Unit):
    """A unit of which a rank may use nothing, or call a part without using it."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side, self.use = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), "both"

    def forward(self, x_BD: Tensor) -> Tensor:
        if self.use == "nothing":
            return x_BD * 1.0
        y_BD, side_BD = self.main(x_BD).tanh() + x_BD, self.side(x_BD)
        return y_BD if self.use == "side unused" else y_BD + side_BD


def fail(grad: Tensor) -> None:
    raise ArithmeticError("no luck in backward")


class Forks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Forked() for _ in range(UNITS))
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fails = False
        self.double()

    def forward(self, x_BD: Tensor) -> Tensor:
        x_BD = self.first(x_BD)
        for number, block in enumerate(self.blocks):
            x_BD = block(x_BD)
            if self.fails and number == 1:
                x_BD.register_hook(fail)
        return self.head(x_BD)

    def uses(self, last: int, use: str) -> Forks:
        """Of so many of the last blocks."""
        for block in range(-last, 0):
            self.blocks[block].use = use
        return self


def rows(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return tuple(torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Forking:
    """Rank 1 leaves a part of the last unit out, or of several, which backward comes to first."""

    backend: str
    clipping: str
    use: str
    units: int = 1

    def run(self) -> dict[str, Any]:
        rank = dist.get_rank()
        bare = Forks().uses(self.units, self.use) if rank else Forks()
        model, _ = BACKENDS[self.backend](bare, privacy_config(max_grad_norm=1.0, clipping=self.clipping))
        inputs, targets = rows(rank)
        with Collectives() as collectives:
            for _ in range(MICROBATCHES):
                square_losses(model(inputs), targets).mean().backward()
        seen: list[Any] = [None, None]
        dist.all_gather_object(seen, collectives.seen)
        return {"order": seen, "release": Revealed(model).release()}

    def problems(self, found: dict[str, Any]) -> list[str]:
        error = relative_error(found["release"], expected(self.clipping, self.use, self.units, MICROBATCHES))
        (first, second), problems = found["order"], [] if error < TOLERANCE else [f"off by {error:.1e}"]
        # A unit of which a rank uses nothing is reduced early there: sums have process groups of their own.
        return problems if first == second or self.use == "nothing" else [*problems, f"{first}\n  is not\n{second}"]


@dataclass(frozen=True, kw_only=True)
class Interrupted:
    """A backward fails on all ranks when units are reduced, two of them not to the end yet, and is discarded."""

    backend: str

    def run(self) -> list[float]:
        """How far the sums of a microbatch after that are from those of the same microbatch alone, on this rank."""
        (inputs, targets), sums = rows(dist.get_rank()), []
        for failures in (0, 1):
            bare = Forks()
            model, engine = BACKENDS[self.backend](bare, privacy_config(max_grad_norm=1.0, clipping="layer"))
            for bare.fails in (False, True)[: 2 * failures]:
                with contextlib.suppress(ArithmeticError):
                    square_losses(model(10 * inputs), targets).mean().backward()
            engine.discard()
            bare.fails = False
            square_losses(model(inputs), targets).mean().backward()
            engine.model.finish_accumulate()
            sums.append([p.accumulator.clone() for p in engine.model.parameters])
        return [float((x - y).abs().max()) for x, y in zip(*sums, strict=True) if x.numel()]

    def problems(self, found: list[float]) -> list[str]:
        return [] if max(found) == 0 else [f"sums differ by {found}"]


def expected(clipping: str, use: str, units: int, times: int) -> dict[str, Tensor]:
    """The release of both ranks' rows, rank 1 with `use` of the last units."""
    groups, members = Groups(clipping=clipping), Groups(clipping=clipping).members(Forks(), is_unit)
    numel = {name: p.numel() for name, p in trainable(Forks()).items()}
    sums = [
        groups.clipped_sum(row_gradients(model, rows(rank), square_losses), members, 1.0, numel)
        for rank, model in enumerate((Forks(), Forks().uses(units, use)))
    ]
    return {name: times * (x + sums[1][name]) / EXPECTED_BATCH_SIZE for name, x in sums[0].items()}


TASKS: list[Forking | Interrupted] = [
    Forking(backend=backend, clipping=clipping, use=use)
    for backend in ("fsdp1", "fsdp2")
    for clipping in ("block", "layer")
    for use in ("main", "side unused")
]
TASKS += [
    Forking(backend=backend, clipping=clipping, use="nothing", units=units)
    for backend in ("fsdp1", "fsdp2")
    for clipping in ("block", "layer")
    for units in (MAX_UNDER_WAY + 1, UNITS)
]
TASKS += [Interrupted(backend=backend) for backend in ("fsdp1", "fsdp2")]


def test_no_rank_waits_for_what_another_leaves_out_and_nothing_of_a_failed_backward_stays() -> None:
    """Seen to hang when a group waits for layers that this rank's backward will not reach, when a sum to which this rank
    adds nothing waits for another, and when such a sum starts as late as another group is clipped; and to fail when
    `discard` keeps what was summed.
    """
    results = zip(TASKS, run(play, 2, TASKS, timeout=300.0)[0], strict=True)
    fail_if_any([f"{problem} in {task}" for task, found in results for problem in task.problems(found)])
