"""A parameter reaches the computation by ways that no layer and no function of torch shows: found, or exact.

"weight" is that of a layer, used behind the layer's back; "bare" is on a module with children.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fsdp_dp import PrivacyError, UnsupportedModelError
from tests.unit.toys import ROWS, clipped_sum, flat, moved, private, row_gradients, values

T, D = 4, 3
Use = Callable[[nn.Module, Tensor, Tensor], Tensor]


def _script(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted: Callable[..., Tensor] = torch.jit.script(function)
    return scripted


@_script
def scripted(x: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.linear(x.sin(), w)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x.sin() @ w.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return (g @ w) * x.cos(), torch.einsum("btp,btd->pd", g, x.sin())


class OnlyBackward(torch.autograd.Function):
    """Has a gradient for a weight that it never looks at (a straight-through estimate of another product)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        return g * 2, torch.einsum("btp,btd->pd", g, *ctx.saved_tensors)


@torch.library.custom_op("fsdp_dp_tests::product", mutates_args=())
def product(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.t()


def in_place_of(m: nn.Module, x: Tensor, w: Tensor) -> Tensor:
    return torch.func.functional_call(m.last, {"weight": w}, (x,))


USES: dict[str, Use] = {
    "functional": lambda m, x, w: F.linear(x, w),
    "operator": lambda m, x, w: torch.ops.aten.linear(x, w),
    "data": lambda m, x, w: F.linear(x, w.data),
    "scripted": lambda m, x, w: scripted(x, w),
    "autograd function": lambda m, x, w: Product.apply(x, w),
    "autograd function that never looks": lambda m, x, w: OnlyBackward.apply(x, w),
    "autograd function, from what w gives": lambda m, x, w: OnlyBackward.apply(x, w * 2),
    "autograd function that never looks, recomputed": lambda m, x, w: checkpoint(
        OnlyBackward.apply, x, w, use_reentrant=False
    ),
    "autograd function, recomputed": lambda m, x, w: checkpoint(Product.apply, x, w, use_reentrant=False),
    "custom operator": lambda m, x, w: product(x, w),
    "in the place of another's": in_place_of,
    "vmap": lambda m, x, w: torch.vmap(lambda row: F.linear(row, w))(x),
    "by its name": lambda m, x, w: F.linear(x, next(p for p in m.parameters() if p.shape == (D, D))),
}


class Model(nn.Module):
    def __init__(self, use: Use, bare: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.bare = nn.Parameter(torch.randn(D, D)) if bare else None
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h) + self.use(self, h, self.first.weight if self.bare is None else self.bare)


def row_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().flatten(1).sum(1).mean()


def rows() -> Tensor:
    return torch.randn(ROWS, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


EXACT = ("functional", "operator", "data")
TOLD = r"'bare'|first\.weight' is used by|in the place of its parameter 'last.weight'|TorchScript"


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "of a layer"])
@pytest.mark.parametrize("name", USES)
def test_parameter(name: str, bare: bool) -> None:
    """Exact or refused. Seen to fail when a shared value may enter an autograd Function, which gives it no gradient, also
    where that looks at it in no forward; for another's place, without a look at layers."""
    model, x = Model(USES[name], bare), rows()
    plain = copy.deepcopy(model)
    subject, before = private(model, sampling="external_poisson"), values(model)
    if name in EXACT:
        expected = clipped_sum(row_gradients(plain, row_loss, x)) / ROWS
        row_loss(model, x).backward()
        subject.optimizer.step()
        torch.testing.assert_close(flat(moved(model, before)), expected, rtol=1e-9, atol=1e-11)
    else:
        with pytest.raises((UnsupportedModelError, RuntimeError), match=TOLD):
            row_loss(model, x).backward()
        with pytest.raises(PrivacyError):
            subject.optimizer.step()
        subject.engine.discard()


def test_operators_of_a_script_that_got_a_parameter_from_a_list() -> None:
    """No function of torch sees it. Seen to fail without a look at operators."""
    model = Model(lambda m, x, w: scripted(x, kept[0]), bare=False)
    kept = [model.first.weight]
    subject = private(model, sampling="external_poisson")
    with pytest.raises(UnsupportedModelError, match=r"first\.weight' is used by"):
        row_loss(model, rows())
    subject.engine.discard()


def test_function_that_never_looks_at_a_parameter_from_a_list() -> None:
    """Seen to be released without that part of its gradient: no mode hears of what an autograd Function is given."""
    model = Model(lambda m, x, w: OnlyBackward.apply(x, kept[0]), bare=False)
    kept = [model.first.weight]
    subject = private(model, sampling="external_poisson")
    with pytest.raises(UnsupportedModelError, match=r"first\.weight' is used by OnlyBackward"):
        row_loss(model, rows())
    subject.engine.discard()
    assert torch.autograd.Function.apply.__func__.__module__ == "torch.autograd.function"


def test_function_that_has_no_gradient_for_a_parameter() -> None:
    """Then that is exact: nothing is lost."""

    class Blind(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
            return g * 2, None

    model, x = Model(lambda m, x, w: Blind.apply(x, w), bare=True), rows()
    plain, before, subject = copy.deepcopy(model), values(model), private(model, sampling="external_poisson")
    row_loss(model, x).backward()
    subject.optimizer.step()
    expected = clipped_sum(row_gradients(plain, row_loss, x)) / ROWS
    torch.testing.assert_close(flat(moved(model, before)), expected, rtol=1e-9, atol=1e-11)


REPLACED: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": lambda x: torch.eye(D).double(),
    "parameter": lambda x: nn.Parameter(torch.eye(D).double(), requires_grad=False),
    "of the data": lambda x: x.mean((0, 1)).diag(),
}


@pytest.mark.parametrize("replaced", REPLACED)
def test_layer_that_is_called_with_other_parameters(replaced: str) -> None:
    """A target network, a hypernetwork: the layer's own weight is not used, and has no gradient. Seen to fail without."""
    model = Model(lambda m, x, w: in_place_of(m, x, REPLACED[replaced](x)), bare=False)
    subject = private(model, sampling="external_poisson")
    with pytest.raises(UnsupportedModelError, match=r"Layer 'last'.*functional_call"):
        row_loss(model, rows())
    subject.engine.discard()
