"""What a program does to parameters in a later forward than the first, which are watched: exact, refused, or found soon."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fsdp_dp import PrivacyError, UnsupportedModelError
from fsdp_dp.examination import EARLY
from tests.unit.test_outside_reads import Leaf
from tests.unit.toys import ROWS, Private, clipped_sum, flat, moved, nothing_released, private, row_gradients, values

T, D = 4, 3
Way = Callable[[Any, Tensor], Tensor]


class Late(nn.Module):
    """Goes its way in forwards that are ``late``; layers are also called as usual, which must count once."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.late = way, False
        self.first, self.last, self.leaf, self.norm = nn.Linear(D, D), nn.Linear(D, D), Leaf(), nn.LayerNorm(D)
        self.other = nn.Linear(D, D)
        self.scale = nn.Parameter(torch.randn(D))
        self.double()
        self.kept = [self.first.weight]

    def forward(self, x: Tensor) -> Tensor:
        x = self.leaf(torch.tanh(self.norm(self.first(x)))) * self.scale
        if self.late:
            x = self.way(self, x)
        return self.last(x)


def row_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().sum((1, 2)).mean()


def rows() -> Tensor:
    return torch.randn(ROWS, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def subject_of(way: Way) -> Private:
    """A step has gone before."""
    subject = private(Late(way), sampling="external_poisson")
    step(subject)
    subject.model.late = True  # type: ignore[assignment]
    return subject


def step(subject: Private) -> None:
    row_loss(subject.model, rows()).backward()
    subject.step()


def in_its_hook(m: Late, x: Tensor) -> Tensor:
    handle = m.other.register_forward_pre_hook(lambda module, args: (args[0] @ m.first.weight,))
    y: Tensor = m.other(x)
    handle.remove()
    return y


EXACT: dict[str, Way] = {
    "read": lambda m, x: F.linear(x, m.first.weight),
    "read, and called": lambda m, x: m.first(F.linear(x, m.first.weight, m.first.bias)),
    "called again": lambda m, x: m.first(m.leaf(m.norm(x))),
    "called for the first time": lambda m, x: m.other(x),
    "its forward, not called": lambda m, x: m.first.forward(x),
    "its forward, not called, of a leaf": lambda m, x: m.leaf.forward(x),
    "of a leaf": lambda m, x: m.leaf(x @ m.leaf.weight),
    "of a norm": lambda m, x: m.norm(x * m.norm.weight + m.norm.bias),
    "by its name": lambda m, x: x @ m.get_parameter("first.weight"),
    "in a set": lambda m, x: x + sum(p.sum() for p in {m.first.bias, m.last.bias, m.first.bias}),
    "asked": lambda m, x: x * (m.first.bias if m.first.bias.requires_grad else 1.0),
    "asked for its shape": lambda m, x: x[..., : m.first.weight.shape[0]].to(m.first.weight.dtype),
    "recomputed": lambda m, x: checkpoint(lambda h: m.first(h) @ m.first.weight, x, use_reentrant=False),
    "without a gradient": lambda m, x: x * _norm_of(m.first),
    "in another's hook": in_its_hook,
}


@torch.no_grad()
def _norm_of(layer: nn.Linear) -> Tensor:
    return layer.weight.norm()


@pytest.mark.parametrize("way", EXACT)
def test_release_is_the_oracles(way: str) -> None:
    """Seen to fail without a look at who reads a parameter: what is read first in a later forward had no gradient there."""
    subject = subject_of(EXACT[way])
    for late in (True, True, False, True):
        subject.model.late = late  # type: ignore[assignment]
        plain = Late(EXACT[way])
        plain.load_state_dict(copy.deepcopy(subject.model.state_dict()))
        plain.late = late
        before = values(subject.model)
        step(subject)
        expected = clipped_sum(row_gradients(plain, row_loss, rows())) / ROWS
        torch.testing.assert_close(flat(moved(subject.model, before)), expected, rtol=1e-9, atol=1e-11)
    subject.engine.detach()
    assert [type(m) for m in subject.model.children()] == [nn.Linear, nn.Linear, Leaf, nn.LayerNorm, nn.Linear]


class Swapped(nn.Linear):
    """Its forward reads through a wrapper, and by a function of the program."""

    forward = torch.enable_grad()(lambda self, x: F.linear(x, *_of(self)))


def _of(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight, layer.bias


def test_forward_that_reads_by_others_counts_once() -> None:
    """Seen to fail where who reads is told from the code of the class: both by the tap and by the read."""
    way: Way = lambda m, x: m.other(x)  # noqa: E731
    model, plain = Late(way), Late(way)
    for made in (model, plain):
        torch.manual_seed(1)
        made.other = Swapped(D, D).double()
    subject = private(model, sampling="external_poisson")
    step(subject)
    subject.model.late = plain.late = True  # type: ignore[assignment]
    plain.load_state_dict(copy.deepcopy(model.state_dict()))
    before = values(model)
    step(subject)
    expected = clipped_sum(row_gradients(plain, row_loss, rows())) / ROWS
    torch.testing.assert_close(flat(moved(model, before)), expected, rtol=1e-9, atol=1e-11)


def _written(m: Late, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.last.bias.add_(x.mean((0, 1)))
    return x


def _replaced(m: Late, x: Tensor) -> Tensor:
    m.last.weight = nn.Parameter(torch.eye(D).double(), requires_grad=False)
    return x


class Writing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.layer.bias.add_(g.mean((0, 1)))
        return g, None


REFUSED: dict[str, tuple[Way, str]] = {
    "written": (_written, "'last.bias' was written in forward"),
    "written in backward": (lambda m, x: Writing.apply(x, m.last), "'last.bias' was written in backward"),
    "replaced": (_replaced, "'last.weight' was replaced"),
}


@pytest.mark.parametrize("way", REFUSED)
def test_refused_before_anything_is_released(way: str) -> None:
    """Seen to be released: the means of rows in a bias without noise, and a gradient for a weight that is not used."""
    use, told = REFUSED[way]
    subject = subject_of(use)
    steps = subject.engine.steps
    with pytest.raises((UnsupportedModelError, PrivacyError), match=told):
        step(subject)
    assert subject.engine.steps == steps
    with pytest.raises(PrivacyError):
        subject.optimizer.step()


FOUND: dict[str, Way] = {
    "of a list": lambda m, x: F.linear(x, m.kept[0]),
    "by its name in a dict": lambda m, x: x @ dict(m.named_parameters())["first.weight"],
    "frozen": lambda m, x: (m.first.requires_grad_(False), x)[1],
    "another's": lambda m, x: torch.func.functional_call(m.other, {"weight": torch.eye(D).double()}, (x,)),
    "written to its data": lambda m, x: (m.last.bias.data.add_(x.mean()), x)[1],
}


@pytest.mark.parametrize("way", FOUND)
def test_found_when_forwards_are_watched_again(way: str) -> None:
    """Nothing that costs nothing sees these. Seen never to be found."""
    subject = subject_of(FOUND[way])
    while subject.engine.steps < EARLY[0]:
        step(subject)
    with nothing_released(subject), pytest.raises(UnsupportedModelError):
        row_loss(subject.model, rows())
        subject.optimizer.step()


def test_own_reads_cost_a_layer_no_more_than_without_the_engine() -> None:
    """Counted in the calls of Python functions by which it gets its weight and its bias."""

    @torch.no_grad()
    def calls(layer: nn.Module) -> int:
        found: list[str] = []

        def note(frame: Any, event: str, arg: Any) -> None:
            if event == "call":
                found.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")

        x, before = rows(), sys.getprofile()
        sys.setprofile(note)
        try:
            layer(x)
        finally:
            sys.setprofile(before)
        return sum(x.endswith("module.py:__getattr__") or "late_reads" in x for x in found)

    assert calls(subject_of(lambda m, x: x).model.first) == calls(nn.Linear(D, D).double())  # type: ignore[arg-type]
