"""Small models, rows and attached engines that the engine's tests share.

The default draws every row in every logical batch (sample rate 1) and adds no noise, so that what a test sees is exact:
eight rows, two microbatches of four on one rank, float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fsdp_dp import PrivacyConfig, PrivacyEngine, make_private

ROWS, INPUTS, OUTPUTS = 8, 3, 2
DEFAULTS: dict[str, Any] = {
    "max_grad_norm": 1.0,
    "noise_multiplier": 0.0,
    "expected_batch_size": ROWS,
    "dataset_size": ROWS,
    "target_delta": 1e-3,
}


class Private(NamedTuple):
    """A model, its engine and SGD(lr=1), whose step moves each parameter by minus its released gradient."""

    engine: PrivacyEngine
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def backward(self, x: Tensor) -> None:
        loss(self.model, x).backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loader(self, **changes: Any) -> Any:
        return self.engine.loader(dataset(), **{"microbatch_size": 4, "steps": 2, **changes})


def config(**changes: Any) -> PrivacyConfig:
    options = DEFAULTS | changes
    if "target_epsilon" in changes:
        options.pop("noise_multiplier")
    return PrivacyConfig(**options)


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 4), nn.Tanh(), nn.Linear(4, OUTPUTS)).to(dtype)


def rows(count: int = ROWS, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def dataset() -> list[Tensor]:
    return list(rows())


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """Mean over rows of a loss whose gradients are longer than the default `max_grad_norm` for some rows only."""
    return model(x).sub(1).square().sum(-1).mean()


def private(model: nn.Module | None = None, pass_optimizer: bool = True, **changes: Any) -> Private:
    model = mlp() if model is None else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    engine = make_private(model, config(**changes), optimizer if pass_optimizer else None)
    return Private(engine, model, optimizer)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """What SGD(lr=1) subtracted: the released gradients."""
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.double().flatten() for t in tensors.values()])


class Text(nn.Module):
    """All kinds of layers, a table tied to the head; a row is a scale of its loss, and token ids behind it."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.first = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.lin, self.second = nn.Linear(8, 8), nn.RMSNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(self.table(x[:, 1:].long()))
        return self.head(self.second(hidden + self.lin(hidden).tanh()))


def text_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Its gradient is that of the scale times a sum over tokens: infinite or NaN where the scale is."""
    return (model(x).sin().sum((1, 2)) * x[:, 0]).mean()


def text_rows(count: int = ROWS, scales: Tensor | None = None) -> Tensor:
    tokens = torch.randint(0, 11, (count, 6), generator=torch.Generator().manual_seed(2)).double()
    tokens[0, :3] = 1.0
    scales = torch.linspace(0.01, 3, count).double() if scales is None else scales
    return torch.cat([scales[:, None], tokens], 1)


def tally(count: int) -> nn.Linear:
    """Under `tally_loss` and the rows of ``torch.eye(count)``, the gradient of row i is minus the i-th unit vector.

    Its norm is `max_grad_norm`'s default, so a released gradient times minus the expected batch size says of each row how
    often it is in the release.
    """
    return nn.Linear(count, 1, bias=False).double()


def tally_loss(model: nn.Module, x: Tensor) -> Tensor:
    return -model(x).sum(-1).mean()


def times_in_release(subject: Private) -> Tensor:
    """Steps, and says how often each row of a `tally` was in the release: ``[rows]``."""
    before = values(subject.model)
    subject.step()
    return -flat(moved(subject.model, before)) * subject.engine.privacy.expected_batch_size


def accumulators(engine: PrivacyEngine) -> list[Tensor]:
    """The un-noised sums as they are kept, one flat tensor a parameter: the only look behind the public names."""
    of_parameter = {id(p.parameter): p.accumulator for p in engine.model.parameters}
    return [of_parameter[id(p)] for p in engine.model.root.parameters() if id(p) in of_parameter]


def released(subject: Private) -> Tensor:
    """One release ``[parameters]`` float64, times the expected batch size, taken back before it moves anything."""
    subject.engine.privatize()
    grads = [p.grad for p in subject.model.parameters() if p.grad is not None]
    out = torch.cat([g.double().flatten() for g in grads]) * subject.engine.privacy.expected_batch_size
    subject.engine.discard()
    return out


def only_noise(subject: Private) -> Tensor:
    """A release of a microbatch of padding."""
    with subject.engine.microbatch(torch.zeros(2, dtype=torch.bool)):
        subject.backward(rows(2))
    return released(subject)


def row_gradients(model: nn.Module, row_loss: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> Tensor:
    """The oracle: each row's own gradient by its own backward, ``[rows, parameters]``, on a copy of `model`."""
    plain = copy.deepcopy(model).double()
    gradients = []
    for row in x:
        plain.zero_grad()
        row_loss(plain, row[None].double() if row.is_floating_point() else row[None]).backward()
        gradients.append(torch.cat([(p.grad if p.grad is not None else p * 0).flatten() for p in plain.parameters()]))
    return torch.stack(gradients).detach()


def clipped_sum(gradients: Tensor, bound: float = 1.0) -> Tensor:
    """``sum_i min(1, bound / |G_i|) G_i``."""
    return (gradients * (bound / gradients.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)


@contextmanager
def nothing_released(subject: Private) -> Iterator[None]:
    """The block neither counts a release, nor moves a parameter, nor leaves a gradient."""
    before, steps = values(subject.model), subject.engine.steps
    yield
    assert subject.engine.steps == steps
    assert not flat(moved(subject.model, before)).any()
    assert all(p.grad is None for p in subject.model.parameters())


def assert_trains(subject: Private) -> None:
    """The next logical batch, of all rows, goes through, and releases the clipped sum of exactly those."""
    gradients = row_gradients(_detached_copy(subject.model), loss, rows())
    before, steps = values(subject.model), subject.engine.steps
    own_loop = subject.engine.privacy.sampling == "external_poisson"
    for x in [rows()] if own_loop else next(iter(subject.loader(microbatch_size=ROWS))):
        subject.backward(x)
    subject.step()
    assert subject.engine.steps == steps + 1
    expected = clipped_sum(gradients) / subject.engine.privacy.expected_batch_size
    torch.testing.assert_close(flat(moved(subject.model, before)), expected, rtol=1e-9, atol=1e-12)


def _detached_copy(model: nn.Module) -> nn.Module:
    """A copy of an `mlp` without the engine's hooks."""
    plain = mlp()
    plain.load_state_dict(model.state_dict())
    return plain
