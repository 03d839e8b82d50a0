"""A layer's parameter that the program reads itself: exact in every combination with the layer's own calls, or refused.

`test_release_is_the_oracles` was seen to fail where a shared value is not said to be a parameter, where each read gives
another one, where the layer's own forward gets shared values too, where one that is run again row by row does, and where it
is forgotten which layers were read.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fsdp_dp import PrivacyError, UnsupportedModelError
from tests.unit.toys import ROWS, Private, clipped_sum, flat, moved, private, row_gradients, values

T, D = 4, 3


class Leaf(nn.Module):
    """Without a rule: run again row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).sin()


class Reader(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.first, self.last, self.leaf = nn.Linear(D, D), nn.Linear(D, D), Leaf()
        self.scale = nn.Parameter(torch.ones(D))
        self.several = nn.ParameterList([nn.Parameter(torch.ones(D)) for _ in range(3)])
        self.norm, self.table, self.conv = nn.LayerNorm(D), nn.Embedding(T, D), nn.Conv1d(D, D, 3, groups=D, padding=1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.use(self, torch.tanh(self.first(x))))


def _convolved(m: Any, x: Tensor) -> Tensor:
    """As state-space models do it where their kernels are missing."""
    windows = F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1)
    return (windows * m.conv.weight.squeeze(1)).sum(-1) + m.conv.bias


def _scaled_in_place(m: Any, x: Tensor) -> Tensor:
    keys = m.norm(m.table.weight).unsqueeze(0).permute(0, 2, 1)
    keys /= torch.sqrt(torch.tensor(3.0, dtype=torch.float64))
    return x @ (x.mT @ keys.mT.relu())


def _with_a_view_of_what_is_written(m: Any, x: Tensor) -> Tensor:
    values = m.first(m.table.weight)
    part = values[:, :1]
    values.mul_(2.0)
    return x * part


def _without_gradient(m: Any, x: Tensor) -> Tensor:
    """As LayoutLMv3 reads its tables of positions."""
    with torch.no_grad():
        bias = m.first.weight.t()[torch.arange(T) % D].mean(1, keepdim=True) * m.scale
    return m.first(x) * m.scale + bias


@torch.no_grad()
def _kept(layer: nn.Linear) -> Tensor:
    return layer.weight


def _kept_and_recomputed(m: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda h: F.linear(h, _kept(m.first)), x, use_reentrant=False)


def _kept_scale(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = m.scale.to(torch.float64).contiguous()
    return x * scale


def _with_gradient_within(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        weight = m.first.weight
        with torch.enable_grad():
            return F.linear(x, weight)


def _made_of(layer: nn.Linear) -> nn.Linear:
    made = nn.Linear(D, D, device="meta")
    made.weight, made.bias = layer.weight, layer.bias
    return made


def _used_without_gradient(m: Any, x: Tensor) -> Tensor:
    weight = m.first.weight
    with torch.no_grad():
        constant = F.linear(x, weight)
    return x + constant


def _tokens(x: Tensor) -> Tensor:
    return (x.detach()[..., 0] > 0).long()


USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "beside its layer": lambda m, x: F.linear(m.first(x), m.first.weight),
    "alone": lambda m, x: F.linear(x, m.norm.weight.diag(), m.norm.bias),
    "transposed": lambda m, x: x @ m.first.weight.T,
    "its forward, not called": lambda m, x: m.first.forward(x),
    "bias": lambda m, x: x + m.first.bias.float().double(),
    "of a leaf": lambda m, x: m.leaf(x) + x @ m.leaf.weight,
    "a table as a layer's input": lambda m, x: x + m.norm(m.table.weight),
    "a table, dropout first": lambda m, x: x + m.norm(F.dropout(m.table.weight, 0.0, training=True)),
    "a kernel": _convolved,
    "written in place": _scaled_in_place,
    "written in place, seen in a view": _with_a_view_of_what_is_written,
    "an activation in place": lambda m, x: x + F.relu(m.first(m.table.weight), inplace=True),
    "shape and type only": lambda m, x: x.to(m.first.weight.dtype).reshape(-1, T, m.last.weight.shape[0]),
    "read twice": lambda m, x: F.linear(x, m.first.weight) * F.linear(x, m.first.weight),
    "recomputed": lambda m, x: checkpoint(lambda h: F.linear(m.first(h), m.first.weight), x, use_reentrant=False),
    "detached": lambda m, x: x + m.first.weight.detach().norm() + m.first.weight.data.mean(),
    "without a gradient": _without_gradient,
    "read without a gradient, used with one": lambda m, x: F.linear(x, _kept(m.first)),
    "read without a gradient, recomputed": _kept_and_recomputed,
    "bare, read without a gradient, used with one": _kept_scale,
    "read without a gradient, used with one within": _with_gradient_within,
    "read with a gradient, used without one": _used_without_gradient,
    "by a hook of its layer": lambda m, x: m.first(x),
    "by a hook before its layer": lambda m, x: m.first(x),
    "a table with padding": lambda m, x: x + F.embedding(_tokens(x), m.table.weight, padding_idx=1),
    "a table with padding, the same for all": lambda m, x: x + F.embedding(torch.arange(T), m.table.weight, -T + 1),
    "by its name": lambda m, x: F.linear(x, m.get_parameter("first.weight")) * m.get_parameter("scale"),
    "if it is a parameter": lambda m, x: x * m.scale if isinstance(m.scale, nn.Parameter) else x,
    "if a layer's is a parameter": lambda m, x: x * (m.first.bias if isinstance(m.first.bias, nn.Parameter) else 1.0),
    "what it gives is none": lambda m, x: x * (1.0 if isinstance(m.scale * 2, nn.Parameter) else m.scale),
    "a slice of a list": lambda m, x: x + sum(p for p in m.several[1:]),
    "a module made of it": lambda m, x: _made_of(m.first)(x),
    "in a set": lambda m, x: x + sum(p.sum() for p in {m.scale, m.first.bias, m.scale, m.first.bias}),
    "the same each time": lambda m, x: x * (m.scale if m.scale is m.scale and m.first.bias is m.first.bias else 1.0),
    "the same each time, recomputed": lambda m, x: checkpoint(
        lambda h: h * sum(p.sin() for p in {m.scale, m.first.bias, m.scale}) * m.scale, x, use_reentrant=False
    ),
    "converted to the type that it has": lambda m, x: m.first.to(torch.float64)(x),
}


def model(name: str) -> Reader:
    made = Reader(USES[name])
    if "before its layer" in name:
        made.first.register_forward_pre_hook(lambda module, args: (F.linear(args[0], module.weight, module.bias),))
    elif "hook" in name:
        made.first.register_forward_hook(lambda module, args, output: output + args[0] @ module.weight)
    return made


def row_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().flatten(1).sum(1).mean()


def rows() -> Tensor:
    return torch.randn(ROWS, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def released(subject: Private, microbatch: int) -> Tensor:
    before = values(subject.model)
    for part in rows().split(microbatch):
        row_loss(subject.model, part).backward()
    subject.step()
    return flat(moved(subject.model, before))


@pytest.mark.parametrize("microbatches", [(4, 4, 1), (1, 1, 4)], ids=str)
@pytest.mark.parametrize("name", USES)
def test_release_is_the_oracles(name: str, microbatches: tuple[int, ...]) -> None:
    subject = private(model(name), sampling="external_poisson")
    for microbatch in microbatches:  # the second release's forwards are not watched, the third's are again
        expected = clipped_sum(row_gradients(_as_now(name, subject.model), row_loss, rows())) / ROWS
        torch.testing.assert_close(released(subject, microbatch), expected, rtol=1e-9, atol=1e-11)
    kinds = {type(layer).__name__ for layer in subject.model.children()}
    subject.engine.detach()
    expected_kinds = {nn.Linear, Leaf, nn.LayerNorm, nn.Embedding, nn.Conv1d, nn.ParameterList}
    assert {type(layer) for layer in subject.model.children()} == expected_kinds
    assert kinds == {layer.__name__ for layer in expected_kinds}


def _as_now(name: str, trained: nn.Module) -> nn.Module:
    plain = model(name)
    plain.load_state_dict(copy.deepcopy(trained.state_dict()))
    return plain


def test_shallow_copy_of_a_layer_is_refused() -> None:
    """It has the layer's hooks and its weights. Seen to be released with what it computed counted twice."""
    subject = private(Reader(lambda m, x: copy.copy(m.first)(x)), sampling="external_poisson")
    with pytest.raises(UnsupportedModelError, match=r"first\.weight' is used by linear outside"):
        row_loss(subject.model, rows())
    subject.engine.discard()


class Giving(Reader):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        return self.last(x), self.scale, self.first.weight


@pytest.mark.parametrize(("given", "name"), [(1, "scale"), (2, "first.weight")])
def test_parameter_that_the_model_returns_is_refused_in_the_loss(given: int, name: str) -> None:
    """Seen to be called a layer."""
    subject = private(Giving(lambda m, x: x), sampling="external_poisson")
    outputs = subject.model(rows())
    with pytest.raises(
        PrivacyError, match=f"Parameter '{name}', which the forward gave away .*outside the model's own forward"
    ):
        outputs[given].square().sum()
    subject.engine.discard()


def test_only_what_was_used_is_recorded() -> None:
    """Models ask for a layer's type all the time, which must not cost a tap."""
    subject = private(model("shape and type only"), sampling="external_poisson")
    row_loss(subject.model, rows()).backward()
    assert not any(layer._forward_pre_hooks for layer in (subject.model.first, subject.model.last))


def _moved(m: Any, x: Tensor) -> Tensor:
    m.table.weight.data.lerp_(x.detach().mean(0), 0.1)
    return x + m.table.weight


class Codebook(nn.Module):
    """Entries on a module with children, which are moved to the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.entries = nn.Linear(D, D), nn.Parameter(torch.zeros(D))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.entries.data += h.detach().mean((0, 1))
        return h + self.entries


def _renormed(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return x + F.embedding(_tokens(x), m.table.weight, max_norm=0.5)


def test_what_an_operator_inside_of_a_function_writes_is_refused() -> None:
    """Which tokens the rows have would show in the table. Seen to be released without a look at operators."""
    subject = private(Reader(_renormed), sampling="external_poisson")
    before = values(subject.model)
    with pytest.raises(UnsupportedModelError, match=r"'table.weight' is written by aten.embedding_renorm_"):
        row_loss(subject.model, rows())
    assert not flat(moved(subject.model, before)).any()
    subject.engine.discard()


@pytest.mark.parametrize("of", ["layer", "bare"])
def test_parameters_that_forward_writes_are_refused(of: str) -> None:
    """The mean of all rows would be in the weights without any noise. Seen to be released without a look at writes."""
    subject = private(Reader(_moved) if of == "layer" else Codebook(), sampling="external_poisson")
    with pytest.raises(UnsupportedModelError, match=r"'(table.weight|entries)' is written by (lerp_|add_)"):
        row_loss(subject.model, rows())
    subject.engine.discard()


def _written_after_a_copy(m: Any, x: Tensor) -> Tensor:
    table = m.table.weight.expand(2, T, D)
    flat = table.view(2 * T, D)
    flat.mul_(2.0)
    return x + table[0] + flat[:T]


def _written_and_seen(m: Any, x: Tensor) -> Tensor:
    positions = m.table(torch.arange(T))
    part = positions[:1]
    positions.mul_(2.0)
    return x + part


def _product(x: Tensor, m: Any) -> Tensor:
    return F.linear(x, m.first.weight)


class Product(torch.autograd.Function):
    """Reads the weight itself, where torch records nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.save_for_backward(layer.weight)
        return x @ layer.weight.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g @ ctx.saved_tensors[0], None


def _tied(m: Any, x: Tensor) -> Tensor:
    m.last.weight = m.first.weight
    return x


REFUSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "with a largest norm": lambda m, x: x + F.embedding(_tokens(x), m.table.weight, max_norm=0.5),
    "rows in a weight's place": lambda m, x: x + F.linear(m.first.weight, x[:, 0]).sum(0)[:, None, None],
    "rows in a kernel's place": lambda m, x: x + F.conv1d(m.table.weight.T[None], x.mT[:, :, :2]).sum(2).mT,
    "rows in the second place": lambda m, x: x + torch.cdist(m.first.weight, x[:, 0]).mT[:, None],
    "in memory that is shared": _written_after_a_copy,
    "in memory that is shared, and seen": _written_and_seen,
    "transform": lambda m, x: torch.vmap(lambda row: F.linear(row, m.first.weight))(x),
    "without a graph, recomputed": lambda m, x: checkpoint(_product, x, m, use_reentrant=True),
    "in a function of autograd": lambda m, x: Product.apply(x, m.first),
    "bare, transform": lambda m, x: torch.vmap(lambda row: row * m.scale)(x),
    "assigned": _tied,
    "hooked": lambda m, x: x * (m.scale, m.scale.register_hook(torch.neg))[0],
    "differentiated": lambda m, x: x * torch.autograd.grad(m.scale.sum(), m.scale, allow_unused=True)[0],
    "kept from __init__": lambda m, x: F.linear(x, m.kept[0]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    reader = Reader(REFUSED[name])
    reader.kept = [reader.first.weight]
    subject = private(reader, sampling="external_poisson")
    told = r"'(first\.weight|table\.weight|table|scale)' is (used by|recomputed in backward|assigned)"
    with pytest.raises(UnsupportedModelError, match=told):
        row_loss(subject.model, rows()).backward()
    subject.engine.discard()
