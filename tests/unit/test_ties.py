"""One parameter in several layers, one layer called in several ways, and whole models of them, against the oracle."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_dp import replace_batch_norm
from fsdp_dp.errors import UnsupportedModelError
from tests.unit.test_layers import Conv1D
from tests.unit.toys import ROWS, clipped_sum, flat, moved, private, row_gradients, values

V, T, D = 5, 3, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Scale(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * self.weight


class Product(nn.Module):
    """A matrix in a module without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(D, D, seed=8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x @ self.weight)


class Look(nn.Module):
    """A table in a module without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(V, D, seed=8))

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].sin()


class Tied(nn.Module):
    """``weight`` of all ``layers`` is one parameter; ``use`` goes through them from token ids."""

    def __init__(self, use: Callable[..., Tensor], *layers: nn.Module, bare: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token, self.use, self.layers = nn.Embedding(V, D), use, nn.ModuleList(layers)
        self.double()
        for layer in layers[1:]:
            layer.weight = layers[0].weight
        if bare:
            self.bare = layers[0].weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.use(self, self.token(ids), ids)


def in_turn(m: Tied, x: Tensor, ids: Tensor) -> Tensor:
    for layer in m.layers:
        x = x + layer(x)
    return x


def with_table(m: Tied, x: Tensor, ids: Tensor) -> Tensor:
    return m.layers[1](x + m.layers[0](ids))


def images(m: Tied, x: Tensor, ids: Tensor) -> Tensor:
    return in_turn(m, x.mT, ids).mT


MODELS: dict[str, Callable[[], nn.Module]] = {
    "two linears": lambda: Tied(in_turn, nn.Linear(D, D), nn.Linear(D, D, bias=False)),
    "linear and its transpose": lambda: Tied(in_turn, nn.Linear(D, D), Conv1D(D, D)),
    "linear and leaf": lambda: Tied(in_turn, nn.Linear(D, D), Product()),
    "two leaves and a linear": lambda: Tied(in_turn, Product(), nn.Linear(D, D), Product()),
    "encoder and its transpose, by a function": lambda: Tied(
        lambda m, x, ids: F.linear(m.layers[0](x), m.layers[0].weight.T), nn.Linear(D, D)
    ),
    "table and head, by a function": lambda: Tied(lambda m, x, ids: F.linear(x, m.token.weight)),
    "table and head": lambda: Tied(with_table, nn.Embedding(V, D, padding_idx=1), nn.Linear(D, V)),
    "leaf table and head": lambda: Tied(with_table, Look(), nn.Linear(D, V)),
    "table, leaf table and head": lambda: Tied(
        lambda m, x, ids: m.layers[2](x + m.layers[0](ids) + m.layers[1](ids.flip(1))),
        nn.Embedding(V, D), Look(), nn.Linear(D, V),
    ),
    "bag and head": lambda: Tied(
        lambda m, x, ids: m.layers[1](x + m.layers[0](ids)[:, None]), nn.EmbeddingBag(V, D, padding_idx=2), nn.Linear(D, V)
    ),
    "bags": lambda: Tied(
        lambda m, x, ids: m.layers[0](ids, per_sample_weights=x[..., 0].detach()) * m.layers[1](ids),
        nn.EmbeddingBag(V, D, mode="sum", padding_idx=0), nn.EmbeddingBag(V, D),
    ),
    "norms and a scale": lambda: Tied(in_turn, nn.LayerNorm(D), nn.RMSNorm(D), Scale(torch.ones(D))),
    "two convolutions": lambda: Tied(images, nn.Conv1d(D, D, 3, padding=1), nn.Conv1d(D, D, 3, padding="same", dilation=2)),
    "convolutions of few channels": lambda: Tied(
        images, nn.Conv1d(D, D, 3, padding=1, groups=2), nn.Conv1d(D, D, 3, padding=2, dilation=2, groups=2)
    ),
    "group norm and instance norm": lambda: Tied(images, nn.GroupNorm(2, D), nn.InstanceNorm1d(D, affine=True)),
    "a layer's weight, bare as well": lambda: Tied(
        lambda m, x, ids: m.layers[0](x).sin() @ m.bare * m.bare[0], nn.Linear(D, D), bare=True
    ),
    "one bare matrix and its transpose": lambda: Autoencoder(),
    "one linear on all that there is": lambda: Tied(
        lambda m, x, ids: m.layers[0](x) + m.layers[0](m.layers[0](x[:, 0]))[:, None] + m.layers[0](x.unsqueeze(1)).sum(1)
        + m.layers[0](x.reshape(-1, D)).view(x.shape), nn.Linear(D, D),
    ),
    "a block many times": lambda: Repeated(),
    "attention many times": lambda: Attentive(),
    "batch norm replaced": lambda: replaced(),
    "parametrized": lambda: Tied(in_turn, nn.utils.parametrizations.weight_norm(nn.Linear(D, D).double())),
}  # fmt: skip


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token, self.matrix = nn.Embedding(V, D), nn.Parameter(normal(2, D))
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(F.linear(self.token(ids), self.matrix).sin(), self.matrix.T)


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Embedding(V, D)
        self.block = nn.Sequential(nn.Conv1d(D, D, 3, padding=1), nn.GroupNorm(2, D), nn.ReLU(), nn.Conv1d(D, D, 1))
        self.scale = Scale(torch.ones(D))
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids).mT
        for _ in range(3):
            x = x + self.block(x)
        return self.scale(self.scale(x.mT))


class Attentive(nn.Module):
    """One attention on itself, on others, and with its projection tied to another's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Embedding(V, D)
        self.first, self.second = (nn.MultiheadAttention(D, 2, batch_first=True) for _ in range(2))
        self.double()
        self.second.in_proj_weight = self.first.in_proj_weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        x = x + self.first(x, x, x)[0]
        x = x + self.first(x, y := x.sin(), y)[0]
        return x + self.second(x, x.cos(), x.sin())[0]


def replaced() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(D, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, D, 1), nn.SyncBatchNorm(D))
    return Tied(lambda m, x, ids: m.layers[0](x.mT), replace_batch_norm(net))


def row_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().flatten(1).sum(1).mean()


IDS = torch.randint(V, (ROWS, T), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", MODELS)
def test_release_is_the_oracles(name: str) -> None:
    model = MODELS[name]()
    expected = clipped_sum(row_gradients(model, row_loss, IDS)) / ROWS
    subject, before = private(model, sampling="external_poisson"), values(model)
    for part in IDS.split(4):
        row_loss(model, part).backward()
    subject.optimizer.step()
    torch.testing.assert_close(flat(moved(model, before)), expected, rtol=1e-9, atol=1e-11)


def test_bags_by_offsets_are_refused() -> None:
    model = Tied(lambda m, x, ids: m.layers[0](ids.flatten(), torch.arange(len(ids)) * T), nn.EmbeddingBag(V, D))
    private(model, sampling="external_poisson")
    with pytest.raises(UnsupportedModelError, match="by offsets"):
        row_loss(model, IDS).backward()


# ------------------------------------------------------------------------------------------------------- batch norm


def test_batch_norm_is_replaced_where_it_is() -> None:
    """Parameters carry over as they are, tied and frozen ones too; a norm in two places stays one."""
    norm = nn.BatchNorm2d(64, eps=1e-2)
    norm.weight.requires_grad_(False)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 1), norm, nn.ModuleDict({"again": norm, "plain": nn.BatchNorm1d(6, affine=False)})
    )
    weight, bias = norm.weight, norm.bias
    assert replace_batch_norm(model.eval()) is model
    new = model[1]
    assert isinstance(new, nn.GroupNorm) and new is model[2]["again"] and not new.training
    assert new.weight is weight and new.bias is bias and new.eps == 1e-2 and new.num_groups == 16
    assert not list(model.buffers()) and model[2]["plain"].weight is None
    assert isinstance(replace_batch_norm(nn.BatchNorm1d(3)), nn.GroupNorm)
    x = torch.randn(2, 64, 5, 5)
    torch.testing.assert_close(new(x), F.group_norm(x, 16, weight, bias, 1e-2))


def test_nothing_else_is_replaced() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2))
    before = copy.deepcopy(list(model.named_modules()))
    replace_batch_norm(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in before]
