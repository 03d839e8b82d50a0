"""Modules without a rule: exact against the oracle, or refused; never silently wrong. See `layers.leaf`.

Legend: B rows, T positions, D inputs.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_dp import leaf_calls
from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.layers import leaf as leaf_rule
from fsdp_dp.leaf_calls import Recomputed
from tests.unit.toys import ROWS, clipped_sum, flat, moved, private, row_gradients, values

T, D = 3, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameter(*shape: int, seed: int = 5) -> nn.Parameter:
    return nn.Parameter(normal(*shape, seed=seed))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Leaf(nn.Module):
    """A forward of the test's own over named parameters."""

    def __init__(self, forward: Callable[..., Any], **parameters: nn.Parameter) -> None:
        super().__init__()
        for name, p in parameters.items():
            self.register_parameter(name, p)
        self.function = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Around(nn.Module):
    """A Linear in front and one behind, so that coupled rows would show."""

    def __init__(self, leaf: nn.Module, use: Callable[[nn.Module, Tensor], Tensor] = lambda leaf, x: leaf(x)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.leaf, self.last, self.use = nn.Linear(D, D), leaf, nn.Linear(D, 2), use
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.use(self.leaf, self.first(x)))


class Floor(torch.autograd.Function):
    """Has no rule for `torch.func`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.floor()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def data_dependent(leaf: nn.Module, x: Tensor) -> Tensor:
    """Some positions of some rows go another way."""
    rows, positions = torch.where(x[..., 0] > 0)
    return x.index_put((rows, positions), x[rows, positions] @ leaf.w)


def windows(leaf: nn.Module, x: Tensor) -> Tensor:
    """Positions as rows of their own."""
    return leaf(x.flatten(0, 1)).unflatten(0, x.shape[:2])


LEAVES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "prelu": (lambda: nn.PReLU(T), lambda m, x: m(x)),
    "bilinear": (lambda: nn.Bilinear(D, D, D), lambda m, x: m(x, x.flip(1).contiguous())),
    "gru cell": (lambda: nn.GRUCell(D, D), lambda m, x: torch.stack([m(x[:, t], m(x[:, 0])) for t in range(T)], 1)),
    "lstm cell": (lambda: nn.LSTMCell(D, D), lambda m, x: m(x[:, 1], m(x[:, 0]))[0][:, None] + x),
    "scale of no dimension": (lambda: Leaf(lambda m, x: x * m.s, s=parameter()), lambda m, x: m(x)),
    "one parameter under two names": (
        lambda: Leaf(lambda m, x: torch.tanh(x * m.a) * m.b, a=(p := parameter(D)), b=p), lambda m, x: m(x),
    ),
    "data-dependent": (lambda: Leaf(data_dependent, w=parameter(D, D)), lambda m, x: m(x)),
    "custom function": (lambda: Leaf(lambda m, x: Floor.apply(x * m.w) + m.w, w=parameter(D)), lambda m, x: m(x)),
    "mask by keyword": (
        lambda: Leaf(lambda m, x, *, mask, options: torch.where(mask, x * m.w, options["fill"]), w=parameter(D)),
        lambda m, x: m(x, mask=x.detach() > 0, options={"fill": 0.5}),
    ),
    "a table as long as the batch": (
        lambda: Leaf(lambda m, x, table: x * m.w + table[:T], w=parameter(D)),
        lambda m, x: m(x, normal(ROWS, D, seed=9)),
    ),
    "ids of the rows": (
        lambda: Leaf(lambda m, x, ids: x + m.w[ids], w=parameter(5, D)),
        lambda m, x: m(x, (x.detach()[..., 0] * 10).long() % 5),
    ),
    "ids of no row": (lambda: Leaf(lambda m, ids: m.w[ids], w=parameter(5, D)), lambda m, x: x * m(torch.arange(T))),
    "expanded ids": (
        lambda: Leaf(lambda m, ids: m.w[ids], w=parameter(5, D)), lambda m, x: x * m(torch.arange(T).expand(len(x), T)),
    ),
    "rows and a shared value": (
        lambda: Leaf(lambda m, x, s: x * m.w + s, w=parameter(D)), lambda m, x: m(x, m(torch.ones(T, D).double(), 0.0)),
    ),
    "positions as rows": (lambda: Leaf(lambda m, x: x @ m.w, w=parameter(D, D)), windows),
    "windows that see each other": (
        lambda: Leaf(lambda m, x: (x.view(-1, T, D) * m.w).cumsum(1).view(-1, D), w=parameter(D)), windows,
    ),
    "sequence first": (
        lambda: Leaf(lambda m, x: (x * m.w).cumsum(0), w=parameter(D)), lambda m, x: m(x.transpose(0, 1)).transpose(0, 1)
    ),
    "unused output": (lambda: Leaf(lambda m, x: (x * m.w, [x.mean() * m.v]), w=parameter(D), v=parameter(D)),
                      lambda m, x: m(x)[0]),
    "several calls": (lambda: Leaf(lambda m, x: torch.tanh(x @ m.w), w=parameter(D, D)), lambda m, x: m(m(x)[:, :2])),
    "called with other options": (
        lambda: Leaf(lambda m, x, k: x * m.w**k, w=parameter(D)), lambda m, x: m(m(x, 1), 2),
    ),
}  # fmt: skip


def row_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().flatten(1).sum(1).mean()


def release_of(model: nn.Module, x: Tensor, microbatch: int, **changes: Any) -> tuple[Tensor, Tensor]:
    """The oracle's and the engine's."""
    expected = clipped_sum(row_gradients(model, row_loss, x)) / ROWS
    subject = private(model, sampling="external_poisson", **changes)
    before = values(model)
    for part in x.split(microbatch):
        row_loss(model, part).backward()
    subject.optimizer.step()
    return flat(moved(model, before)), expected


@pytest.mark.parametrize("name", LEAVES)
def test_release_is_the_oracles(name: str) -> None:
    make, use = LEAVES[name]
    for microbatch in (ROWS, 4, 1):
        x = normal(ROWS, T, D, seed=3)
        if name == "a table as long as the batch" and microbatch != ROWS:
            continue
        found, expected = release_of(Around(make(), use), x, microbatch)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scratch", [1, 1 << 25])
def test_large_gradients_are_computed_again(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the room: a row at a time, and all together."""
    made = []
    monkeypatch.setattr(leaf_rule, "STORE_AT_MOST", 0)
    monkeypatch.setattr(leaf_calls, "MAX_SCRATCH_ELEMENTS", scratch)
    monkeypatch.setattr(leaf_rule, "Recomputed", lambda *args: made.append(Recomputed(*args)) or made[-1])
    for name in ("bilinear", "gru cell", "data-dependent", "positions as rows", "ids of no row", "several calls"):
        make, use = LEAVES[name]
        made.clear()
        found, expected = release_of(Around(make(), use), normal(ROWS, T, D, seed=3), ROWS)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        assert made, name


def test_a_row_that_comes_out_longer_the_second_time_keeps_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that add in any order. Seen to fail without the second measurement."""
    monkeypatch.setattr(leaf_rule, "STORE_AT_MOST", 0)
    model = Around(Leaf(lambda m, x: x @ m.w * m.factor, w=parameter(D, D)))
    model.leaf.factor = 1.0
    for p in (*model.first.parameters(), *model.last.parameters()):
        p.requires_grad_(False)
    subject = private(model, sampling="external_poisson", max_grad_norm=1.0)
    x = normal(1, T, D, seed=3).expand(ROWS, T, D)
    made = []
    monkeypatch.setattr(leaf_rule, "Recomputed", lambda *args: made.append(Recomputed(*args)) or made[-1])
    original = Recomputed.weighted_sum

    def later(self: Recomputed, *args: Tensor) -> Tensor:
        model.leaf.factor = 3.0
        out = original(self, *args)
        model.leaf.factor = 1.0
        return out

    monkeypatch.setattr(Recomputed, "weighted_sum", later)
    (row_loss(model, x) * 100).backward()
    before = values(model)
    subject.optimizer.step()
    assert made and float(flat(moved(model, before)).norm()) <= 1.0


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.calls = parameter(D), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.w * self.calls


class Hidden(nn.Module):
    """Its parameter is reached through a list."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.w = parameter(D)
        self.weights = [self.w.detach()[None] if view else self.w]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights[0]


def with_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(Leaf(lambda m, x: x @ m.w, w=parameter(D, D)), "w")


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "rows coupled by a mean": (lambda: Leaf(lambda m, x: m.w * (x - x.mean(0)), w=parameter(D)), "mixes rows"),
    "rows coupled in a sort": (lambda: Leaf(lambda m, x: m.w * x.sort(0)[0], w=parameter(D)), "picked from all rows"),
    "rows coupled by attention": (
        lambda: Leaf(lambda m, x: torch.softmax(x.flatten(1) @ x.flatten(1).T, 1)[:, :1, None] * x * m.w, w=parameter(D)),
        "mixes rows",
    ),
    "dropout": (lambda: Leaf(lambda m, x: F.dropout(x * m.w, 0.5), w=parameter(D)), "random numbers.*nn.Dropout"),
    "dropout beside a condition": (
        lambda: Leaf(lambda m, x: F.dropout(data_dependent(m, x), 0.5), w=parameter(D, D)), "random numbers",
    ),
    "writes to its input": (lambda: Leaf(lambda m, x: x.mul_(m.w.detach()) * m.w, w=parameter(D)), "in place"),
    "keeps a state": (Counted, "keeps a state"),
    "hidden parameter": (lambda: Hidden(False), "does not read from its own attribute"),
    "hidden view": (lambda: Hidden(True), "does not read from its own attribute"),
    "weight norm": (with_weight_norm, "pre-hook.*parametrizations"),
    "recurrent, with a forward of its own": (lambda: Skipping(D, D, batch_first=True), "Skipping is recurrent"),
    "batch norm": (lambda: nn.BatchNorm1d(T), r"replace_batch_norm\(model\)"),
    "replaced forward": (lambda: replaced(), "make it a class"),
}  # fmt: skip


class Skipping(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(input, hx)[0] + input


def replaced() -> nn.Module:
    module = Leaf(lambda m, x: x * m.w, w=parameter(D))
    module.forward = lambda x: x * module.w
    return module


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused(name: str) -> None:
    make, words = REFUSED[name]
    x = normal(ROWS, T, D, seed=3)
    with pytest.raises(UnsupportedModelError, match=words):
        model = Around(make())
        subject = private(model, sampling="external_poisson")
        row_loss(model, x).backward()
        subject.optimizer.step()


def test_nothing_is_released_after_a_refusal() -> None:
    model = Around(Counted())
    subject = private(model, sampling="external_poisson")
    with pytest.raises(UnsupportedModelError, match="keeps a state"):
        row_loss(model, normal(ROWS, T, D)).backward()
    with pytest.raises(RuntimeError):
        subject.optimizer.step()
    assert subject.engine.steps == 0


def test_a_form_that_comes_later_is_proven_then() -> None:
    """Rows are coupled in longer sequences only. Seen to fail when a module is proven once and for all."""
    model = Around(Leaf(lambda m, x: m.w * (x - x.mean(0) if x.shape[1] > 2 else x), w=parameter(D)))
    subject = private(model, sampling="external_poisson")
    row_loss(model, normal(ROWS, 2, D)).backward()
    subject.optimizer.step()
    subject.optimizer.zero_grad()
    with pytest.raises(UnsupportedModelError, match=r"^Layer 'leaf': Leaf \(parameters: w\).*mixes rows"):
        row_loss(model, normal(ROWS, 3, D)).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """Against the float64 gradient at the rounded parameters and inputs; nothing is rounded to the format in between."""
    x, slopes = normal(ROWS, T, D, seed=3).to(dtype), normal(ROWS, T, D, seed=4).to(dtype)
    module = Leaf(lambda m, x: torch.tanh(x @ m.w) * m.s, w=parameter(D, D), s=parameter(D)).to(dtype)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) * slopes[: len(x)].to(x.dtype)).sum() / len(x)

    wide = [(copy.deepcopy(module).double(), a.double(), g.double()) for a, g in zip(x, slopes, strict=True)]
    exact = [torch.autograd.grad((m(a[None]) * g).sum(), list(m.parameters())) for m, a, g in wide]
    subject = private(module, sampling="external_poisson", max_grad_norm=1e6)
    loss(module, x).backward()
    subject.engine.privatize()
    found = torch.cat([p.grad.flatten().double() for p in module.parameters()]) * ROWS
    summed = torch.cat([sum(of_rows).flatten() for of_rows in zip(*exact, strict=True)])
    torch.testing.assert_close(found, summed, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_output_of_narrow_numbers(dtype: torch.dtype) -> None:
    """A buffer stays in float32 under FSDP's mixed precision. Seen to fail: refused, as if rows were mixed."""
    x = normal(ROWS, T, 8 * D, seed=3).to(dtype)
    module = Leaf(lambda m, x: (x @ m.w).sin() * m.ramp, w=parameter(8 * D, D)).to(dtype)
    module.register_buffer("ramp", torch.linspace(0.5, 1, D))
    subject = private(module, sampling="external_poisson", max_grad_norm=1e6)
    module(x).square().sum((1, 2)).mean().backward()
    wide = copy.deepcopy(x.double())
    w = module.w.detach().double().requires_grad_()
    loss = ((wide @ w).sin() * module.ramp).square().sum((1, 2)).mean()
    (expected,) = torch.autograd.grad(loss, [w])
    subject.engine.privatize()
    error = float((module.w.grad.double() - expected).norm() / expected.norm())
    assert error <= 8 * torch.finfo(dtype).eps
