"""What an auditor would try: unusual uses of parameters and rows between two Linears, each exact or refused.

Legend: B rows, T positions, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from fsdp_dp import PrivacyConfig, UnsupportedModelError, make_private
from tests.unit.toys import ROWS, clipped_sum, flat, moved, private, row_gradients, values

T, D = 4, 3
Make = Callable[[], dict[str, Any]]
Use = Callable[[Any, Tensor], Tensor]


def p(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).T


def symmetric() -> nn.Module:
    linear = nn.Linear(D, D)
    parametrize.register_parametrization(linear, "weight", Symmetric())
    return linear


class DropConnect(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, 0.5), self.bias)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -0.5 * g


def detached(m: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        more = m.c(h)
    return m.c(h) + more + m.c(h).detach()


def cells(m: Any, h: Tensor) -> Tensor:
    states: list[Any] = [None]
    for t in range(T):
        states.append(m.c(h[:, t], states[-1]))
    return torch.stack([state[0] for state in states[1:]], 1)


def clamped(m: Any, h: Tensor) -> Tensor:
    y = h * 1.0
    y.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    return y


def ids(h: Tensor) -> Tensor:
    return (h.detach()[..., 0] * 3).long().clamp(0, 8)


def linear() -> dict[str, Any]:
    return {"c": nn.Linear(D, D)}


def ones(h: Tensor, *shape: int) -> Tensor:
    return torch.ones(*shape, dtype=h.dtype)


EXACT: dict[str, tuple[Make, Use]] = {
    "weight norm": (lambda: {"c": nn.utils.parametrizations.weight_norm(nn.Linear(D, D))}, lambda m, h: m.c(h)),
    "orthogonal": (lambda: {"c": nn.utils.parametrizations.orthogonal(nn.Linear(D, D))}, lambda m, h: m.c(h)),
    "symmetric": (lambda: {"c": symmetric()}, lambda m, h: m.c(h)),
    "expanded input": (linear, lambda m, h: m.c(h[:, :1].expand(-1, T, -1)) * h),
    "the same for all rows": (linear, lambda m, h: h + m.c(ones(h, 1, 1, D).expand_as(h))),
    "no row": (linear, lambda m, h: h * m.c(ones(h, D)) + m.c(ones(h, 1, D))),
    "shared norm": (lambda: {"c": nn.LayerNorm(D)}, lambda m, h: m.c(h) + m.c(h.sin() * 2)),
    "detached uses": (linear, detached),
    "over positions": (lambda: {"c": nn.Linear(T, T)}, lambda m, h: m.c(h.mT).mT),
    "bilinear": (lambda: {"c": nn.Bilinear(D, D, D)}, lambda m, h: m.c(h, h.sin())),
    "prelu": (lambda: {"c": nn.PReLU(D)}, lambda m, h: m.c(h.mT).mT),
    "recurrence along the rows' own steps": (
        lambda: {"c": nn.GRU(D, D, batch_first=True)}, lambda m, h: m.c(h)[0] + m.c(h.mT.mT, m.c(h)[1])[0]
    ),
    "cells": (lambda: {"c": nn.LSTMCell(D, D)}, cells),
    "gradient reversal": (dict, lambda m, h: Reversed.apply(h)),
    "bags": (lambda: {"c": nn.EmbeddingBag(9, D)}, lambda m, h: h + m.c(ids(h))[:, None]),
    "both sides": (lambda: {"p": p(D, D)}, lambda m, h: h @ m.p.T + (m.p @ h.mT).mT),
    "normalised by itself": (lambda: {"p": p(D, D)}, lambda m, h: h @ F.normalize(m.p, dim=0) * m.p.norm()),
    "clamped by a parameter": (lambda: {"p": p(D)}, lambda m, h: torch.addcmul(h, m.p, h, value=0.3).clamp(min=m.p)),
    "dictionary": (
        lambda: {"p": nn.ParameterDict({"g": p(D), "h": p(1, T, 1)})}, lambda m, h: h * m.p["g"] + m.p["h"]
    ),
    "mixed by softmax": (
        lambda: {"p": p(3)}, lambda m, h: sum(w * x for w, x in zip(m.p.softmax(0), (h, h.sin(), h.cos()), strict=True))
    ),
    "iterated": (lambda: {"p": p(3)}, lambda m, h: torch.stack([h * w for w in m.p], -1).sum(-1)),
    "spectrum": (
        lambda: {"p": p(T // 2 + 1, D, 2)},
        lambda m, h: torch.fft.irfft(torch.fft.rfft(h, dim=1) * torch.view_as_complex(m.p), n=T, dim=1),
    ),
    "hypernetwork": (
        lambda: {"c": nn.Linear(D, D * D)}, lambda m, h: torch.bmm(h, m.c(h.mean(1)).view(-1, D, D))
    ),
    "masked by rows": (lambda: {"p": p(D)}, lambda m, h: h + m.p * (h.detach().sum(-1, keepdim=True) > 0)),
    "lookup, sequence first": (lambda: {"c": nn.Embedding(9, D)}, lambda m, h: h + m.c(ids(h).T).transpose(0, 1)),
    "start image": (lambda: {"c": nn.Conv1d(D, D, 1), "p": p(1, D, T)}, lambda m, h: h + m.c(m.p).mT),
    "start image, upsampled": (
        lambda: {"c": nn.ConvTranspose1d(D, D, 2, 2), "p": p(1, D, T // 2)},
        lambda m, h: h + m.c(m.p.repeat(len(h), 1, 1)).mT,
    ),
    "several start images": (lambda: {"c": nn.Conv1d(D, D, 1), "p": p(2, D, T)}, lambda m, h: h + m.c(m.p).sum(0).T),
    "start image without a batch": (lambda: {"c": nn.Conv1d(D, D, 1), "p": p(D, T)}, lambda m, h: h + m.c(m.p).T),
    "start image of instances": (
        lambda: {"c": nn.InstanceNorm1d(D, affine=True), "p": p(1, D, T)}, lambda m, h: h + m.c(m.p).mT
    ),
    "start image of groups": (lambda: {"c": nn.GroupNorm(1, D), "p": p(1, D, T)}, lambda m, h: h + m.c(m.p).mT),
    # Eight rows of the same, and eight channels: rows were taken for channels.
    "start image of as many channels as rows": (
        lambda: {"c": nn.GroupNorm(1, ROWS), "p": p(1, ROWS, T)},
        lambda m, h: h + m.c(m.p.expand(len(h), -1, -1)).mean(1)[..., None],
    ),
    "views of one row, each by itself": (
        lambda: {"c": nn.Linear(D, D)}, lambda m, h: m.c(h.flatten(0, 1)).tanh().unflatten(0, (len(h), T))
    ),
    "prompt": (
        lambda: {"p": p(1, 2, D)}, lambda m, h: torch.cat([m.p.expand(len(h), -1, -1), h], 1).cumsum(1)[:, 2:]
    ),
    "rolled": (lambda: {"p": p(T, D)}, lambda m, h: h + m.p.roll(1, 0) + m.p.flip(0).cumsum(0)),
}  # fmt: skip
REFUSED: dict[str, tuple[Make, Use, str]] = {
    "spectral norm": (
        lambda: {"c": nn.utils.parametrizations.spectral_norm(nn.Linear(D, D))}, lambda m, h: m.c(h), "vmap"
    ),
    "features are rows": (
        lambda: {"c": nn.Linear(ROWS, ROWS)}, lambda m, h: m.c(h.transpose(0, 2)).transpose(0, 2), "told apart by row"
    ),
    "recurrence along rows": (lambda: {"c": nn.GRU(D, D)}, lambda m, h: m.c(h)[0], "told apart by row"),
    "dropped weights": (lambda: {"c": DropConnect(D, D)}, lambda m, h: m.c(h), "draws random numbers"),
    "table that forward rewrites": (
        lambda: {"c": nn.Embedding(9, D, max_norm=0.5)}, lambda m, h: h + m.c(ids(h)), "max_norm"
    ),
    "divided by counts": (
        lambda: {"c": nn.Embedding(9, D, scale_grad_by_freq=True)}, lambda m, h: h + m.c(ids(h)), "scale_grad_by_freq"
    ),
    "sum over rows": (dict, lambda m, h: h + h.detach().cumsum(0) * 0.1, "other rows"),
    "mean over rows": (dict, lambda m, h: h - h.mean(0), "other rows"),
    "sorted rows": (dict, lambda m, h: h.sort(0)[0], "picked"),
    "turned rows": (linear, lambda m, h: m.c(h.flip(0)).flip(0), "other rows"),
    "gathered": (
        lambda: {"p": p(9, D)}, lambda m, h: h + m.p.gather(0, ids(h).flatten()[:, None].expand(-1, D)).view_as(h),
        "used by gather",
    ),
    "gradient that is not linear": (dict, clamped, "not linear"),
}  # fmt: skip


class Model(nn.Module):
    def __init__(self, make: Make, use: Use) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.use = nn.Linear(D, D), nn.Linear(D, D), use
        for name, part in make().items():
            setattr(self, name, part)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.use(self, self.first(x)))


def row_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().flatten(1).sum(1).mean()


def rows() -> Tensor:
    return torch.randn(ROWS, T, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    model, x = Model(*EXACT[name]), rows()
    expected = clipped_sum(row_gradients(copy.deepcopy(model), row_loss, x)) / ROWS
    subject, before = private(model, sampling="external_poisson"), values(model)
    row_loss(model, x).backward()
    subject.optimizer.step()
    torch.testing.assert_close(flat(moved(model, before)), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, use, told = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=told):
        subject = private(Model(make, use), sampling="external_poisson")
        row_loss(subject.model, rows()).backward()
        subject.optimizer.step()


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (torch.zeros(0), "'p': it has no elements"),
        (torch.zeros(2, dtype=torch.complex64), "'p': it is torch.complex64"),
    ],
)
def test_parameters_that_cannot_be_clipped_are_named(parameter: Tensor, message: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.p = nn.Parameter(parameter)
    privacy = PrivacyConfig(
        max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=4, dataset_size=100, target_delta=1e-3,
        sampling="external_poisson",
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=message):
        make_private(model, privacy)
    model.p.requires_grad_(False)
    make_private(model, privacy).detach()
