"""Privacy costs no communication: the collectives of plain FSDP, and under tensor parallelism one more.

Plain FSDP runs beside the private model, of the same torch version and with the same fp32 reduce, so the counts need no
table. They are taken from the first forward on, since lazy set-up could hide an extra collective there.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as TorchFSDP
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed.backends import (
    BACKENDS,
    ddp,
    fsdp1_arguments,
    fsdp2,
    fsdp2_hybrid,
    over_data_and_tensor,
    played,
    privacy_config,
    sequence_parallel,
    tensor_parallel,
)
from tests.oracle import CASES

STEPS, MICROBATCHES = 2, 2


class Collectives(TorchDispatchMode):
    """Counts the collectives that are issued inside, by kind, and their bytes; backward runs on this thread, too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts.update(kinds(func._opname))
            # A gathered output, a bucket to be scattered: the larger side of the collective.
            size = max((x.nbytes for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)), default=0)
            self.bytes.update(dict.fromkeys(kinds(func._opname), size))
        return func(*args, **(kwargs or {}))


def kinds(operator: str) -> list[str]:
    """`_allgather_base_` and `all_gather_into_tensor` are both an all-gather; waiting and wrapping send nothing."""
    plain = operator.replace("_", "")
    if plain.startswith(("wait", "wrap")):
        return []
    return [next((kind for kind in ("allgather", "reducescatter", "allreduce") if kind in plain), plain)]


PLAIN: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fsdp1": lambda model: TorchFSDP(model, **fsdp1_arguments()),
    "fsdp1 shard_grad_op": lambda model: TorchFSDP(model, **fsdp1_arguments("SHARD_GRAD_OP")),
    "fsdp1 root only": lambda model: TorchFSDP(model, **fsdp1_arguments(units=False)),
    "fsdp1 bf16": lambda model: TorchFSDP(model, **fsdp1_arguments(bf16=True)),
    "fsdp1 no_shard": lambda model: TorchFSDP(model, **fsdp1_arguments("NO_SHARD")),
    "fsdp1 hybrid": lambda model: TorchFSDP(model, **fsdp1_arguments("HYBRID_SHARD")),
    "fsdp1 hybrid zero2": lambda model: TorchFSDP(model, **fsdp1_arguments("_HYBRID_SHARD_ZERO2")),
    "fsdp2 hybrid": fsdp2_hybrid,
    "ddp": ddp,
    "fsdp2": fsdp2,
    "fsdp2 root only": functools.partial(fsdp2, units=False),
    "fsdp2 bf16": functools.partial(fsdp2, bf16=True),
    "tp 2x2": functools.partial(over_data_and_tensor, split=tensor_parallel, data=(2,)),
    "sp 2x2": functools.partial(over_data_and_tensor, split=sequence_parallel, data=(2,)),
}


@dataclass(frozen=True, kw_only=True)
class Count:
    """Collectives of every forward and backward of a few steps, and of every optimizer step.

    Also the parameters that had a `.grad` after a backward.
    """

    case: str
    backend: str
    private: bool

    def run(self) -> dict[str, list[Any]]:
        case, (inputs, targets) = CASES[self.case], CASES[self.case].batch(torch.float32)
        model = case.model(torch.float32)
        if self.private:
            model, _ = BACKENDS[self.backend](model, privacy_config(max_grad_norm=1.0))
        else:
            model = PLAIN[self.backend](model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        counts: dict[str, list[Any]] = {"microbatches": [], "bytes": [], "steps": [], "with grad": []}
        for _ in range(STEPS):
            for _ in range(MICROBATCHES):
                with Collectives() as collectives:
                    case.row_losses(model(inputs), targets).mean().backward()
                counts["microbatches"].append(dict(collectives.counts))
                counts["bytes"].append(dict(collectives.bytes))
                counts["with grad"] += [name for name, p in model.named_parameters() if p.grad is not None]
            with Collectives() as collectives:
                optimizer.step()
            counts["steps"].append(dict(collectives.counts))
            optimizer.zero_grad()
        return counts


def tasks(cases: tuple[str, ...], backends: tuple[str, ...]) -> list[Count]:
    return [Count(case=c, backend=b, private=private) for c in cases for b in backends for private in (False, True)]


CASES_COUNTED = ("decoder", "tied", "partly frozen", "checkpointed")
BACKENDS_COUNTED = (
    "fsdp1",
    "fsdp1 shard_grad_op",
    "fsdp1 root only",
    "fsdp1 bf16",
    "fsdp2",
    "fsdp2 root only",
    "fsdp2 bf16",
)
HYBRID = ("fsdp1 hybrid", "fsdp1 hybrid zero2", "fsdp2 hybrid")
TASKS = {
    2: tasks(("decoder",), BACKENDS_COUNTED) + tasks(CASES_COUNTED[1:], ("fsdp1", "fsdp2")),
    4: (
        tasks(("decoder", "checkpointed"), ("tp 2x2",))
        + tasks(("four positions",), ("sp 2x2",))
        + tasks(("decoder",), ("fsdp1", "fsdp2", *HYBRID, "fsdp1 no_shard", "ddp"))
    ),
}
results = functools.cache(lambda world_size: played(world_size, TASKS[world_size]))


def extra(task: Count) -> Counter[str]:
    """What privacy adds: norms of rows that ranks hold parts of, and with sequence parallelism the parts themselves."""
    if task.backend.startswith("tp"):
        return Counter(allreduce=1)
    # Five norm layers with eight parameters see a part of the positions. Plain training adds the parts up once a
    # parameter, we do once a layer.
    return Counter(allreduce=1 + 5 - 8) if task.backend.startswith("sp") else Counter()


@pytest.mark.parametrize("world_size", TASKS)
def test_forward_and_backward_have_the_collectives_of_plain_fsdp(world_size: int) -> None:
    counts = results(world_size)
    for task in TASKS[world_size]:
        if task.private and task.backend != "ddp":
            plain = counts[Count(case=task.case, backend=task.backend, private=False)]
            expected = [Counter(one) for one in plain["microbatches"]]
            for one in expected:
                one.update(extra(task))
            assert counts[task]["microbatches"] == expected, task
            if not extra(task):
                assert counts[task]["bytes"] == plain["bytes"], task


def test_ddp_sends_the_bytes_of_plain_ddp() -> None:
    """In one all-reduce a block, where DDP fills buckets of 25 MB."""
    plain, private = (results(4)[Count(case="decoder", backend="ddp", private=x)]["bytes"][-1] for x in (False, True))
    assert private == plain != {}


@pytest.mark.parametrize("world_size", TASKS)
def test_a_release_communicates_nothing_after_the_first(world_size: int) -> None:
    """Every rank draws the noise of its own shard. (The checks of the first release run the model once more.)"""
    for task, found in results(world_size).items():
        assert found["steps"][1:] == [{}] * (STEPS - 1), task


@pytest.mark.parametrize("world_size", TASKS)
def test_no_gradient_shows_between_backward_and_step(world_size: int) -> None:
    for task, found in results(world_size).items():
        assert bool(found["with grad"]) != task.private, (task, found["with grad"])


def test_the_counter_sees_what_fsdp_is_known_to_issue() -> None:
    """Three units: each is gathered for forward, the two blocks again for backward, and each is reduced."""
    for backend in ("fsdp1", "fsdp2"):
        found = results(2)[Count(case="decoder", backend=backend, private=False)]["microbatches"]
        assert found[-1] == {"allgather": 5, "reducescatter": 3}
