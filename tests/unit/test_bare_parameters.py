"""What programs do with parameters outside of layers: exact against the oracle, or refused by name."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_dp import PrivacyConfig, make_private
from fsdp_dp.errors import UnsupportedModelError
from tests.unit.toys import ROWS, clipped_sum, flat, moved, private, row_gradients, values

T, D = 3, 4
Use = Callable[[nn.Module, Tensor], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Model(nn.Module):
    def __init__(self, use: Use, **parameters: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.use = nn.Linear(D, D), nn.Linear(D, 2), use
        for name, p in parameters.items():
            self.register_parameter(name, nn.Parameter(p.clone()))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.use(self, self.first(x)))


def masked(x: Tensor) -> Tensor:
    return x.detach()[..., 0] > 0


def assigned(m: nn.Module, x: Tensor) -> Tensor:
    y = x.clone()
    y[masked(x)] = m.token
    return y


def biased(m: nn.Module, x: Tensor) -> Tensor:
    """As Swin: a table of relative positions, looked up by a constant."""
    places = (torch.arange(T)[:, None] - torch.arange(T) + T - 1).flatten()
    bias = m.table[places].view(T, T, 2).permute(2, 0, 1).unsqueeze(0)
    return (torch.softmax((x @ x.mT)[:, None] + bias, -1) @ x[:, None]).mean(1)


def mixed(m: nn.Module, x: Tensor) -> Tensor:
    return sum(w * y for w, y in zip(m.w.softmax(0), (x, x.sin(), x.cos()), strict=True))


def resized(m: nn.Module, x: Tensor) -> Tensor:
    grid = m.p.reshape(1, 2, 2, D).permute(0, 3, 1, 2)
    return x + F.interpolate(grid, size=(1, T), mode="bilinear").flatten(2).transpose(1, 2)


def attended(queries: Callable[[nn.Module, int], Tensor]) -> Use:
    return lambda m, x: torch.softmax(queries(m, len(x)) @ x.mT, -1) @ x


EXACT: dict[str, tuple[Use, dict[str, Tensor]]] = {
    "relative position bias": (biased, {"table": normal(2 * T - 1, 2)}),
    "resized positions": (resized, {"p": normal(1, 4, D)}),
    "mask token by where": (lambda m, x: torch.where(masked(x)[..., None], x, m.token), {"token": normal(1, 1, D)}),
    "mask token by assignment": (assigned, {"token": normal(D)}),
    "mask token by a product": (
        lambda m, x: x * (w := masked(x).double()[..., None]) + m.token * (1 - w), {"token": normal(D)},
    ),
    "layer scale": (lambda m, x: x + m.gamma * x.tanh(), {"gamma": normal(D)}),
    "temperature": (lambda m, x: x * m.t.exp().clamp(max=100), {"t": normal()}),
    "weighted layers": (mixed, {"w": normal(3)}),
    "matrix from the left": (lambda m, x: m.w @ x, {"w": normal(T, T)}),
    "matrices of positions": (
        lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), {"w": normal(T, D, D)},
    ),
    "weight of unit length": (
        lambda m, x: F.linear(x, m.w / m.w.norm(dim=1, keepdim=True), m.b), {"w": normal(D, D), "b": normal(D)},
    ),
    "convolution": (lambda m, x: F.conv1d(x.mT, m.w, padding=1).mT, {"w": normal(D, D, 3)}),
    "expanded queries": (attended(lambda m, B: m.q.expand(B, -1, -1)), {"q": normal(1, 2, D)}),
    "repeated queries": (attended(lambda m, B: m.q.unsqueeze(0).repeat(B, 1, 1)), {"q": normal(2, D)}),
    "repeated and scaled": (attended(lambda m, B: m.q.repeat(B, 1, 1) * m.s), {"q": normal(1, 2, D), "s": normal(D)}),
    "class and register tokens": (
        lambda m, x: torch.cat([m.c.expand(len(x), -1, -1) + m.p[:, :1], x + m.p[:, 1:], m.r.expand(len(x), -1, -1)], 1),
        {"c": normal(1, 1, D), "p": normal(1, T + 1, D), "r": normal(1, 2, D)},
    ),
    "added to zeros of the batch": (lambda m, x: x + (torch.zeros(len(x), T, D).double() + m.p), {"p": normal(D)}),
    "looked up by the rows": (lambda m, x: x + m.table[masked(x).long()], {"table": normal(2, D)}),
    "data and detach": (lambda m, x: x * m.p.data + x.sin() * m.p.detach() + m.p, {"p": normal(D)}),
    "in place": (lambda m, x: x.clone().add_(m.p), {"p": normal(D)}),
    "spectrum": (
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.view_as_complex(m.w), n=T, dim=1),
        {"w": normal(2, D, 2)},
    ),
    "distances": (lambda m, x: torch.cdist(x, m.p.expand(len(x), -1, -1)), {"p": normal(D, D)}),
    "distances without a batch": (lambda m, x: torch.cdist(x, m.p), {"p": normal(D, D)}),
    "codebook distances": (lambda m, x: (x.unsqueeze(2) - m.p).square().sum(-1), {"p": normal(D, D)}),
    "condition": (lambda m, x: x * m.p if m.p.sum() > -100 else x, {"p": normal(D)}),
}  # fmt: skip
REFUSED: dict[str, tuple[Use, dict[str, Tensor]]] = {
    "scattered": (
        lambda m, x: x.scatter(1, torch.zeros(len(x), 1, D).long(), m.p.expand(len(x), 1, D)), {"p": normal(1, 1, D)},
    ),
    "assigned by index": (
        lambda m, x: x.index_put((torch.arange(len(x)), masked(x)[:, 0].long()), m.p.expand(len(x), D)), {"p": normal(D)},
    ),
    "tensordot": (lambda m, x: torch.tensordot(x, m.p, dims=([2], [0])), {"p": normal(D, D)}),
}  # fmt: skip


def row_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().flatten(1).sum(1).mean()


@pytest.mark.parametrize("name", EXACT)
def test_release_is_the_oracles(name: str) -> None:
    use, parameters = EXACT[name]
    for microbatch in (ROWS, 2):
        model, x = Model(use, **parameters), normal(ROWS, T, D, seed=3)
        expected = clipped_sum(row_gradients(model, row_loss, x)) / ROWS
        subject, before = private(model, sampling="external_poisson"), values(model)
        for part in x.split(microbatch):
            row_loss(model, part).backward()
        subject.optimizer.step()
        torch.testing.assert_close(flat(moved(model, before)), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", REFUSED)
def test_other_uses_are_refused_with_a_way_out(name: str) -> None:
    use, parameters = REFUSED[name]
    model = Model(use, **parameters)
    private(model, sampling="external_poisson")
    with pytest.raises(UnsupportedModelError, match=r"'p' (is used|meets).*wrap (that|the) use"):
        model(normal(ROWS, T, D, seed=3))


def test_inputs_that_require_grad_are_rows_in_the_rehearsal_too() -> None:
    """Its copies of them do not. Seen to fail when what requires grad was not remembered as row data."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.table = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x + self.table)

    privacy = PrivacyConfig(
        max_grad_norm=1.0, noise_multiplier=0.0, expected_batch_size=5, dataset_size=100, target_delta=1e-5,
        sampling="external_poisson",
    )  # fmt: skip
    model = Positions()
    engine = make_private(model, privacy)
    model(torch.randn(5, 3, 4, requires_grad=True)).square().mean((1, 2)).mean().backward()
    engine.privatize()
    assert model.table.grad is not None
