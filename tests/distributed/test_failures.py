"""What fails on one rank ends all ranks, soon, with that rank's message (rule 12): under torchrun, and on the harness."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from fsdp_dp import PrivacyConfig, PrivacyEngine, make_private
from tests.distributed.harness import RankFailure, run

ROOT = Path(__file__).parents[2]
LIMIT_S = 30
STARTUP_S = 120  # for torchrun and two imports of torch on a busy machine, before anything fails

# Two FSDP2 ranks; rank 1 fails in the second logical batch, in the way that the first argument says.
SCRIPT = """
    import os, sys, time
    import torch, torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from fsdp_dp import PrivacyConfig, make_private

    FAULT, DIRECTORY = sys.argv[1:]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
            self.fault = None

        def forward(self, x):
            hidden = self.first(x).tanh()
            if self.fault == "tap":
                failing()
                return self.second(hidden.mean(0, keepdim=True)).expand(len(x), 2)
            return self.second(hidden)

    def failing():
        with open(f"{DIRECTORY}/failed_at", "w") as file:
            file.write(str(time.time()))

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    open(f"{DIRECTORY}/pid{rank}", "w").write(str(os.getpid()))
    torch.manual_seed(0)
    model = fully_shard(Model())
    privacy = PrivacyConfig(
        max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=8, dataset_size=64, target_delta=1e-3,
        sampling="external_poisson",
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = make_private(model, privacy, optimizer)
    for batch in range(3):
        fault = FAULT if rank == 1 and batch == 1 else None
        model.fault = fault
        mask = torch.ones(4, dtype=torch.bool)
        if fault == "mask":
            failing()
            mask = mask[:3]
        with engine.microbatch(mask):
            loss = model(torch.randn(4, 3)).square().sum(1).mean()
            if fault == "user code":
                failing()
                raise ArithmeticError("no luck between forward and backward")
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print("all releases made")
"""

MESSAGES = {
    "user code": "ArithmeticError: no luck between forward and backward",
    "tap": "Layer 'second': its input has shape (1, 4)",
    "mask": "The mask has shape (3,), but the model's first input has 4 rows",
}


@pytest.mark.parametrize("fault", MESSAGES)
def test_failure_on_one_rank_ends_all_ranks_with_its_message(fault: str, tmp_path: Path) -> None:
    """Seen to fail when the engine swallows a refusal: the other rank then waits for ever."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    code, output = _torchrun(script, fault, str(tmp_path))
    ended = time.time()
    assert code != 0, output
    assert MESSAGES[fault] in output
    assert "all releases made" not in output
    assert ended - float((tmp_path / "failed_at").read_text()) < LIMIT_S
    assert [rank for rank in range(2) if _alive(int((tmp_path / f"pid{rank}").read_text()))] == []


def fail_in_forward(engine: PrivacyEngine, model: nn.Module) -> None:
    with engine.microbatch(torch.ones(4, dtype=torch.bool)):
        model(torch.ones(4, 7))


def fail_in_backward_of_the_loss(engine: PrivacyEngine, model: nn.Module) -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("no luck in backward")

    Failing.apply(model(torch.ones(4, 3)).sum()).backward()


def step_without_a_backward(engine: PrivacyEngine, model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def load_another_mechanism(engine: PrivacyEngine, model: nn.Module) -> None:
    engine.load_state_dict(engine.state_dict() | {"max_grad_norm": 3.0})


FAULTS = {
    fail_in_forward: "shapes cannot be multiplied",
    fail_in_backward_of_the_loss: "no luck in backward",
    step_without_a_backward: "without a backward since the last release",
    load_another_mechanism: "max_grad_norm was 3.0 when the state was saved",
}


def train_until_rank_1_fails(rank: int, world_size: int, fault: Callable[[PrivacyEngine, nn.Module], None]) -> None:
    torch.manual_seed(0)
    model = fully_shard(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    privacy = PrivacyConfig(
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        expected_batch_size=8,
        dataset_size=64,
        target_delta=1e-3,
        sampling="external_poisson",
    )
    engine = make_private(model, privacy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in range(3):
        if rank == 1 and batch == 1:
            fault(engine, model)
        model(torch.ones(4, 3)).square().sum(1).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("fault", FAULTS)
def test_failure_on_one_rank_is_the_one_that_is_reported(fault: Callable[[PrivacyEngine, nn.Module], None]) -> None:
    """Seen to fail when the fault does nothing."""
    start = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        run(train_until_rank_1_fails, 2, fault, timeout=60)
    assert caught.value.rank == 1
    assert FAULTS[fault] in str(caught.value)
    assert time.monotonic() - start < LIMIT_S


def _torchrun(*arguments: object) -> tuple[int, str]:
    """torchrun with two ranks: its exit status, and what it and its ranks said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=STARTUP_S + LIMIT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # torchrun ends its ranks, which are in sessions of their own
        output, _ = process.communicate()
        pytest.fail(f"torchrun did not end:\n{output}")
    return process.returncode, output


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _failed_backward_then_steps(rank: int, world_size: int) -> list[bool]:
    """Whether the model holds, after each step, what the optimizer stepped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    fully_shard(model[0])
    fully_shard(model)
    privacy = PrivacyConfig(
        max_grad_norm=1.0, noise_multiplier=0.0, expected_batch_size=8, dataset_size=8, target_delta=1e-3,
        sampling="external_poisson",
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = make_private(model, privacy, optimizer)

    def fail(grad: torch.Tensor) -> None:
        raise ArithmeticError

    hook = model[0].register_forward_hook(lambda module, args, out: out.register_hook(fail) and None)
    with pytest.raises(ArithmeticError):
        model(torch.ones(4, 3)).sum().backward()
    hook.remove()
    engine.discard()
    stepped = optimizer.param_groups[0]["params"]
    same = []
    for _ in range(2):
        model(torch.ones(4, 3)).sum(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        same.append(all(a is b for a, b in zip(model.parameters(), stepped, strict=True)))
    return same


def test_steps_after_a_failed_backward_are_seen_by_who_evaluates() -> None:
    """FSDP2 leaves units gathered, as they were before the step. Seen to fail when only a forward ends that."""
    assert run(_failed_backward_then_steps, 2) == [[True, True]] * 2


def _told_of_differences(rank: int, world_size: int) -> list[str]:
    """What `make_private` and `engine.loader` say where rank 1 asks for something else."""
    options: dict[str, Any] = {
        "max_grad_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 8, "dataset_size": 64, "target_delta": 1e-3,
    }  # fmt: skip
    found = []
    for change in (
        {"max_grad_norm": 2.0},
        {"noise_multiplier": 2.0},
        {"clipping": "layer"},
        {"dataset_size": 65},
        "freeze",
    ):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        if change == "freeze" and rank:
            model[1].requires_grad_(False)
        mine = change if rank and isinstance(change, dict) else {}
        try:
            make_private(fully_shard(model), PrivacyConfig(**options | mine))
        except ValueError as error:
            found.append(str(error))
    engine = make_private(fully_shard(nn.Linear(3, 2)), PrivacyConfig(**options))
    try:
        engine.loader([torch.zeros(3)] * 64, microbatch_size=4 * (1 + rank))
    except ValueError as error:
        found.append(str(error))
    return found


def test_ranks_that_differ_in_an_option_are_told_so_on_all_of_them() -> None:
    """Seen to fail: bounds of 1 and 2 trained with the epsilon of either, and microbatches of 4 and 8 rows hung."""
    first, second = run(_told_of_differences, 2)
    assert first == second
    expected = [
        "make_private: PrivacyConfig.max_grad_norm is 1.0 on rank 0 and 2.0 on rank 1",
        "make_private: PrivacyConfig.noise_multiplier is 1.0 on rank 0 and 2.0 on rank 1",
        "make_private: PrivacyConfig.clipping is 'flat' on rank 0 and 'layer' on rank 1",
        "make_private: PrivacyConfig.dataset_size is 64 on rank 0 and 65 on rank 1",
        "make_private: the list of trainable parameters is '4, 26 elements",
        "engine.loader: microbatch_size is 4 on rank 0 and 8 on rank 1",
    ]
    assert [message[: len(start)] for message, start in zip(first, expected, strict=True)] == expected
