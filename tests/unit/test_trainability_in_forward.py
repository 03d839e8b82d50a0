"""A forward that freezes a parameter, or asks whether it is trained, does what it does without privacy, or is refused.

In forward no parameter requires a gradient (the freeze window), which the program must not be told and cannot change.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_dp import UnsupportedModelError
from tests.unit.toys import ROWS, clipped_sum, flat, moved, nothing_released, private, row_gradients, values

D = 3
Way = Callable[[Any, Tensor], Tensor]


class Model(nn.Module):
    def __init__(self, way: Way) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.forwards = way, 0
        self.first, self.last, self.scale = nn.Linear(D, D), nn.Linear(D, D), nn.Parameter(torch.randn(D))
        self.kept = [self.first.weight]
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.last(self.way(self, torch.tanh(self.first(x))))


def row_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().sum(1).mean()


def rows() -> Tensor:
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _by_assignment(m: Model, x: Tensor) -> Tensor:
    weight = m.first.weight
    weight.requires_grad = False
    return F.linear(x, weight)


def _its_module(m: Model, x: Tensor) -> Tensor:
    m.first.requires_grad_(False)
    return x


def _on_a_list(m: Model, x: Tensor) -> Tensor:
    m.kept[0].requires_grad = False
    return x


def _later(m: Model, x: Tensor) -> Tensor:
    weight = m.first.weight
    return F.linear(x, weight.requires_grad_(False) if m.forwards > 5 else weight)


FREEZING: dict[str, Way] = {
    "read from a layer": lambda m, x: F.linear(x, m.first.weight.requires_grad_(False)),
    "by assignment": _by_assignment,
    "bare": lambda m, x: x * m.scale.requires_grad_(False),
    "its module": _its_module,
    "of a list": _on_a_list,
    "all": lambda m, x: x * next(p.requires_grad_(False) for p in m.parameters()),
}


@pytest.mark.parametrize("way", FREEZING)
def test_freezing_in_forward_is_refused(way: str) -> None:
    """From here on it would have no gradient. Seen to be released with one."""
    subject = private(Model(FREEZING[way]), sampling="external_poisson")
    with nothing_released(subject), pytest.raises(UnsupportedModelError, match="is set to False in forward"):
        row_loss(subject.model, rows()).backward()
    subject.engine.discard()


def test_freezing_in_a_later_forward_is_refused() -> None:
    """Of a parameter that is read; no forward is watched then."""
    subject = private(Model(_later), sampling="external_poisson")
    with pytest.raises(UnsupportedModelError, match=r"'first\.weight' is set to False in forward"):
        for _ in range(6):
            row_loss(subject.model, rows()).backward()
            subject.step()
    assert subject.model.forwards == 6
    subject.engine.discard()


def test_asking_for_a_parameter_that_is_not_read_is_refused() -> None:
    """A weight penalty over what is trained found nothing that is. Seen to be released without."""

    def penalised(m: Model, x: Tensor) -> Tensor:
        return x + sum((p.square().sum() for p in m.parameters() if p.requires_grad), torch.zeros(()))

    subject = private(Model(penalised), sampling="external_poisson")
    with nothing_released(subject), pytest.raises(UnsupportedModelError, match=r"asks in forward whether .*'scale'"):
        row_loss(subject.model, rows()).backward()
    subject.engine.discard()


EXACT: dict[str, Way] = {
    "asks of a layer's": lambda m, x: F.linear(x, m.first.weight) if m.first.weight.requires_grad else x,
    "asks of a bare one": lambda m, x: x * m.scale if m.scale.requires_grad else x,
    "asks of what it computed": lambda m, x: x * (m.scale * 2 if (m.scale * 2).requires_grad else 0),
    "asks of a constant": lambda m, x: x * (2 if m.scale.detach().requires_grad else m.scale),
    "says that it is trained": lambda m, x: F.linear(x, m.first.weight.requires_grad_()),
    "says so of what it made": lambda m, x: x * m.scale + torch.zeros_like(m.scale).requires_grad_(),
    "asks of what rows made": lambda m, x: x * m.scale if x.requires_grad else x,
}


@pytest.mark.parametrize("way", EXACT)
def test_release_is_the_oracles(way: str) -> None:
    """Seen to fail, for the first three, where a shared value says that it requires no gradient."""
    subject = private(Model(EXACT[way]), sampling="external_poisson")
    for _ in range(2):
        plain = Model(EXACT[way])
        plain.load_state_dict(copy.deepcopy(subject.model.state_dict()))
        before = values(subject.model)
        row_loss(subject.model, rows()).backward()
        subject.step()
        expected = clipped_sum(row_gradients(plain, row_loss, rows())) / ROWS
        torch.testing.assert_close(flat(moved(subject.model, before)), expected, rtol=1e-9, atol=1e-11)
