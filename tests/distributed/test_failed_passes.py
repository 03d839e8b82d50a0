"""A forward or backward that fails on all ranks, and whose exception the program catches: training goes on as if without it.

Sharded modules leave units gathered, or on their way, when a pass fails: with the weights as they were then.
"""

import contextlib
import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from fsdp_dp import PrivacyEngine
from tests.distributed.backends import (
    BACKENDS,
    EXPECTED_BATCH_SIZE,
    TOLERANCE,
    fail_if_any,
    local,
    optimizer_for,
    played,
    privacy_config,
    reduction_held_back,
    whole_parameters,
)
from tests.oracle import CASES, Gradients, bare_name, median_norm, relative_error, rows_of_step, share, trained

STEPS = 3


def unwrapped(model: nn.Module, name: str) -> nn.Module:
    """The module that the bare model has under that name."""
    bare = (m for m in model.named_modules() if not isinstance(m[1], FullyShardedDataParallel))
    return {bare_name(f"{n}.weight").removesuffix(".weight").removeprefix("module."): m for n, m in bare}[name]


@dataclass(frozen=True, kw_only=True)
class Failing:
    """A run in which a pass fails at a module before one of the steps; and once more at the end."""

    backend: str
    at: str
    before: int = 1
    in_forward: bool = False

    @property
    def case(self) -> str:
        return "four positions" if self.backend.startswith("sp") else "decoder"

    def run(self) -> tuple[Gradients, float]:
        """How far the parameters moved; and how far off outputs are once weights were loaded after a failure."""
        case = CASES[self.case]
        model, engine = BACKENDS[self.backend](case.model(), privacy_config(max_grad_norm=median_norm(self.case)))
        optimizer = optimizer_for(self.backend, "momentum", model)
        start = whole_parameters(model)
        for step in range(STEPS):
            if step == self.before:
                self._fail(model, engine)
                engine.discard()
            self._pass(model, engine, step)
            optimizer.step()
            optimizer.zero_grad()
        moved = {name: p - start[name] for name, p in whole_parameters(model).items()}
        self._fail(model, engine)
        engine.discard()
        with torch.no_grad():
            for p in model.parameters():
                local(p).mul_(0.5)
        error = self._outputs_are_off(model)
        engine.detach()
        return moved, error

    def _pass(self, model: nn.Module, engine: PrivacyEngine, step: int) -> None:
        case = CASES[self.case]
        split = {"rank": engine.model.data_rank, "size": engine.model.data_size}
        inputs, targets = case.batch()
        for numbers, mask in share(rows_of_step(case.rows, step), **split, microbatch=2):
            with engine.microbatch(mask):
                case.row_losses(model(inputs[numbers]), targets[numbers]).mean().backward()

    def _fail(self, model: nn.Module, engine: PrivacyEngine) -> None:
        def fail(*_: object) -> None:
            raise ArithmeticError

        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            fail() if self.in_forward else output.register_hook(fail)

        handle = unwrapped(model, self.at).register_forward_hook(hook)
        held_back = reduction_held_back(model) if self.in_forward else contextlib.nullcontext()
        with held_back, pytest.raises(ArithmeticError):
            self._pass(model, engine, 0)
        handle.remove()

    def _outputs_are_off(self, model: nn.Module) -> float:
        """From those of a bare model with the same parameters."""
        bare, now = CASES[self.case].model(), whole_parameters(model)
        inputs, _ = CASES[self.case].batch()
        with torch.no_grad():
            for name, p in bare.named_parameters():
                p.copy_(now[name])
            return float((model.eval()(inputs) - bare(inputs)).abs().max())


@dataclass(frozen=True, kw_only=True)
class Evaluated(Failing):
    """A run in which the model is evaluated between backward and step."""

    at: str = "nowhere"

    def _fail(self, model: nn.Module, engine: PrivacyEngine) -> None:
        """No pass fails."""

    def _pass(self, model: nn.Module, engine: PrivacyEngine, step: int) -> None:
        super()._pass(model, engine, step)
        if step < STEPS - 1:
            with torch.no_grad():
                model.eval()(CASES[self.case].batch()[0])
            model.train()


PLACES = ({"at": "head"}, {"at": "blocks.1"}, {"at": "blocks.0", "before": 0, "in_forward": True})
BACKENDS_OF = {
    2: (
        *("fsdp1", "fsdp1 shard_grad_op", "fsdp1 no_shard", "fsdp1 nested", "fsdp2", "fsdp2 not resharded"),
        *("fsdp2 root only", "ddp", "zero1", "tp 1x2", "tp alone"),
    ),
    4: ("fsdp1 hybrid", "fsdp1 hybrid zero2", "fsdp2 hybrid", "fsdp2 resharded to 2", "tp 2x2", "sp 2x2"),
}
results = functools.cache(
    lambda size: played(
        size,
        [Failing(backend=b, **place) for b in BACKENDS_OF[size] for place in PLACES]
        + [Evaluated(backend=b) for b in BACKENDS_OF[size]],
    )
)


@functools.cache
def expected(case: str) -> Gradients:
    return trained(case, steps=STEPS, optimizer="momentum", expected_batch_size=EXPECTED_BATCH_SIZE)


@pytest.mark.parametrize("size", BACKENDS_OF)
def test_training_goes_on_as_if_no_pass_had_failed(size: int) -> None:
    """Seen to fail when FSDP1 is left as a failed backward leaves it: it takes every later forward for a recomputation; and,
    when it is left as an evaluation leaves it, with weights that the step did not move.
    """
    errors = {task: relative_error(moved, expected(task.case)) for task, (moved, _) in results(size).items()}
    fail_if_any([f"{error:.1e} {task}" for task, error in errors.items() if not error <= TOLERANCE])


@pytest.mark.parametrize("size", BACKENDS_OF)
def test_weights_that_are_loaded_after_a_failed_pass_are_used(size: int) -> None:
    """Seen to fail when the units of FSDP2 are left as the failed pass has left them."""
    fail_if_any([f"{error:.1e} {task}" for task, (_, error) in results(size).items() if not error <= TOLERANCE])
