"""Trains a generated architecture on all ranks, and compares what became of it with the oracle's loop."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fsdp_dp import PrivacyEngine
from tests.distributed.backends import (
    BACKENDS,
    EXPECTED_BATCH_SIZE,
    played,
    privacy_config,
    whole_parameters,
)
from tests.generated.architectures import Architecture, draw
from tests.oracle import (
    OPTIMIZERS,
    Gradients,
    norm,
    relative_error,
    row_gradients,
    rows_of_step,
    share,
    trainable,
)

TOLERANCE = {"float64": 1e-10, "float32": 1e-3, "bf16": 4e-2}
"""float64: the worst over parameters; else relative to the norm of the whole update."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One architecture on one backend, clipped at `bound`: how far it moves every parameter."""

    seed: int
    backend: str
    bound: float

    def run(self) -> Gradients:
        of = draw(self.seed)
        dtype = torch.float64 if of.dtype == "float64" else torch.float32
        privacy = privacy_config(
            max_grad_norm=self.bound,
            loss_reduction=of.loss_reduction,
            clipping=of.clipping,
            clip_function=of.clip_function,
        )
        try:
            model, engine = BACKENDS[backend_name(of, self.backend)](of.case().model(dtype), privacy)
            return self._train(of, model, engine)
        except Exception as error:
            error.add_note(self.again)
            raise

    @property
    def again(self) -> str:
        """How to see this case again."""
        return f"Again: python -m tests.generated {self.seed} {self.backend}\n    {draw(self.seed)}"

    def _train(self, of: Architecture, model: nn.Module, engine: PrivacyEngine) -> Gradients:
        case = of.case()
        optimizer, start = OPTIMIZERS["sgd"](model.parameters()), whole_parameters(model)
        inputs, targets = case.batch(next(iter(start.values())).dtype)
        for step in range(of.steps):
            mine = {"rank": engine.model.data_rank, "size": engine.model.data_size, "microbatch": of.microbatch}
            for numbers, mask in share(rows_of_step(of.rows, step), **mine, empty_last=of.empty_last):
                x, y = inputs[numbers], targets[numbers]
                with engine.microbatch(mask):
                    losses = case.row_losses(model(x), y)
                    (losses.mean() if of.loss_reduction == "mean" else losses.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        engine.detach()
        return {name: p - start[name] for name, p in whole_parameters(model).items()}

    def problem(self, moved: Gradients) -> str | None:
        """What is wrong with the outcome."""
        of, expected = draw(self.seed), expected_move(self.seed)
        if of.dtype == "float64":
            error = relative_error(moved, expected)
        else:
            error = norm({name: moved[name].double() - e for name, e in expected.items()}) / norm(expected)
        return None if error <= TOLERANCE[of.dtype] else f"{error:.1e} off the oracle. {self.again}"


def backend_name(of: Architecture, backend: str) -> str:
    """The entry of BACKENDS for the architecture's format and units."""
    if of.dtype == "bf16":
        return f"{backend} bf16"
    return f"{backend} root only" if of.root_only else backend


@functools.cache
def first_gradients(seed: int) -> tuple[Gradients, ...]:
    """Of every row, before the first step."""
    case = draw(seed).case()
    return tuple(row_gradients(case.model(), case.batch(), case.row_losses))


def bound_of(seed: int) -> float:
    """The median of the rows' norms: half of them are clipped."""
    return float(torch.tensor([norm(g) for g in first_gradients(seed)], dtype=torch.float64).median())


@functools.cache
def expected_move(seed: int) -> Gradients:
    """How far the oracle's loop moves every parameter."""
    of = draw(seed)
    case = of.case()
    model, (inputs, targets) = case.model(), case.batch()
    members, numel = of.groups.members(model, of.is_block), {n: p.numel() for n, p in trainable(model).items()}
    start = {n: p.detach().clone() for n, p in trainable(model).items()}
    stepper = OPTIMIZERS["sgd"](model.parameters())
    for step in range(of.steps):
        numbers = rows_of_step(of.rows, step)
        later = row_gradients(model, (inputs[numbers], targets[numbers]), case.row_losses)
        gradients = later if step else iter(first_gradients(seed))
        total = of.groups.clipped_sum(gradients, members, bound_of(seed), numel)
        for n, p in trainable(model).items():
            p.grad = total[n] / EXPECTED_BATCH_SIZE
        stepper.step()
    return {n: p.detach() - start[n] for n, p in trainable(model).items()}


def problems(seeds: Iterable[int], backends: Sequence[str]) -> list[str]:
    """Every case that does not end where the oracle ends, on two ranks that are started once."""
    tasks = [Generation(seed=seed, backend=backend, bound=bound_of(seed)) for seed in seeds for backend in backends]
    outcomes = played(2, tasks)
    return [text for task, moved in outcomes.items() if (text := task.problem(moved)) is not None]
