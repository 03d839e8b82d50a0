"""Layers whose gradients are heard at the operator that made their output, in programs that do things to that output.

Each is compared with a loop over rows in float64, in three microbatches: the first is watched, the others are not. What
`node_taps` must tell from a tap is in `TAPPED`.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fsdp_dp import PrivacyError, UnsupportedModelError
from fsdp_dp.node_taps import NodeTap
from tests.unit.toys import Private, clipped_sum, flat, moved, private, row_gradients, values

ROWS, T, D = 6, 4, 3
Use = Callable[[Any, Tensor], Tensor]


def written(y: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    write(y)
    return y


def hooked(y: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Tensor:
    y.register_hook(hook)
    return y


def node_hooked(y: Tensor) -> Tensor:
    """A hook of the program on the node itself, behind the engine's."""
    made = y if y._base is None else y._base
    if made.grad_fn is not None:
        made.grad_fn.register_prehook(lambda grads: (-3 * grads[0],))
    return y


def retained(y: Tensor) -> Tensor:
    y.retain_grad()
    return y


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


class InGraphOfItsOwn(torch.autograd.Function):
    """A layer whose backward is run inside of backward, as reversible networks do."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, h: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.h = h.detach().requires_grad_()
            ctx.y = layer(ctx.h)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        torch.autograd.backward(ctx.y, g)
        return None, ctx.h.grad


def in_graphs_of_their_own(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h) + InGraphOfItsOwn.apply(layer, h) * InGraphOfItsOwn.apply(layer, h.sin())


USES: dict[str, Use] = {
    "plain": lambda layer, h: layer(h),
    "written to": lambda layer, h: written(layer(h), lambda y: y.mul_(h.sin())),
    "added to": lambda layer, h: layer(h).add_(h),
    "a part written to": lambda layer, h: written(layer(h), lambda y: y[:, 1:].mul_(3)),
    "a part set to zero": lambda layer, h: written(layer(h), lambda y: y[:, 0].zero_()),
    "a view of it written to": lambda layer, h: written(layer(h), lambda y: y.flatten(1).mul_(2)),
    "activated in place": lambda layer, h: F.relu(layer(h), inplace=True),
    "written to by a function": lambda layer, h: Doubled.apply(layer(h) * 1),
    "gradient changed by a hook": lambda layer, h: hooked(layer(h), lambda g: g * g.new_tensor([1.0, -2.0, 0.5])),
    "gradient changed before a write": lambda layer, h: hooked(layer(h), lambda g: -3 * g).mul_(2),
    "gradient changed by a hook on the node": lambda layer, h: node_hooked(layer(h)),
    "gradient retained": lambda layer, h: retained(layer(h)),
    "used twice": lambda layer, h: (lambda y: y * y.sin() + y[:, :1])(layer(h)),
    "called twice": lambda layer, h: layer(h) + layer(h.cos()),
    "called on itself": lambda layer, h: layer(layer(h)),
    "partly unused": lambda layer, h: layer(h)[:, 1:2].expand(-1, T, -1),
    "unused": lambda layer, h: written(h.sin(), lambda y: layer(h)),
    "detached in part": lambda layer, h: layer(h).detach() + layer(h.tanh()),
    "without positions": lambda layer, h: layer(h[:, 0])[:, None].expand(-1, T, -1),
    "transposed input": lambda layer, h: layer(h.mT.contiguous().mT),
    "in graphs of their own": in_graphs_of_their_own,
    "recomputed": lambda layer, h: checkpoint(lambda x: layer(x).sin(), h, use_reentrant=False),
    "offloaded": lambda layer, h: offloaded(layer, h),
}


def offloaded(layer: nn.Module, h: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return layer(h)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, D),
    "linear without bias": lambda: nn.Linear(D, D, bias=False),
    "layer norm": lambda: nn.LayerNorm(D),
    "rms norm": lambda: nn.RMSNorm(D),
}


class Model(nn.Module):
    def __init__(self, layer: nn.Module, use: Use) -> None:
        super().__init__()
        self.first, self.layer, self.last, self.use = nn.Linear(D, D), layer, nn.Linear(D, D), use

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.use(self.layer, self.first(x)))


def model_of(layer: str, use: str) -> Model:
    torch.manual_seed(0)
    return Model(LAYERS[layer](), USES[use]).double()


def batches() -> list[Tensor]:
    made = torch.Generator().manual_seed(3)
    return [torch.randn(ROWS, T, D, generator=made, dtype=torch.float64) for _ in range(3)]


def row_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().flatten(1).sum(1).mean()


def attached(model: nn.Module, **changes: Any) -> Private:
    rows = {"expected_batch_size": 3 * ROWS, "dataset_size": 3 * ROWS}
    return private(model, sampling="external_poisson", max_grad_norm=1.5, **rows, **changes)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("layer", LAYERS)
def test_as_a_loop_over_rows(layer: str, use: str) -> None:
    """Seen to fail with the hook on the output in the node's place (a hook of the program changes the gradient), with a hook
    before the node (another one behind it changes the gradient), with the node of a view in the place of the product's
    (a write gives the view another), and with a unit measured while graphs of their own were still to come."""
    model = model_of(layer, use)
    loop = copy.deepcopy(model)
    expected = sum(clipped_sum(row_gradients(loop, row_loss, x), 1.5) for x in batches()) / (3 * ROWS)
    subject, before = attached(model), values(model)
    for x in batches():
        row_loss(model, x).backward()
    subject.optimizer.step()
    torch.testing.assert_close(flat(moved(model, before)), expected, rtol=1e-9, atol=1e-11)


TAPPED = {"recomputed", "offloaded"}
"""Uses in which no layer but the others is heard at its node."""


@pytest.mark.parametrize("use", ["plain", *sorted(TAPPED)])
@pytest.mark.parametrize("layer", LAYERS)
def test_where_a_tap_is_needed(layer: str, use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved tensors that are packed are recomputed, or fetched, which a node's function would go around."""
    heard: list[str] = []
    monkeypatch.setattr(
        NodeTap, "__call__", lambda self, *grads, run=NodeTap.__call__: (heard.append(self._name), run(self, *grads))[1]
    )
    subject = attached(model_of(layer, use))
    row_loss(subject.model, batches()[0]).backward()
    assert heard.count("last") == 1
    assert heard.count("layer") == (use not in TAPPED)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("microbatch", [0, 1])
def test_an_input_that_was_written_to_is_refused(layer: str, microbatch: int) -> None:
    """As autograd refuses it. Seen to fail without the version's check."""

    def use(m: nn.Module, h: Tensor) -> Tensor:
        h = h * 1
        y = m(h)
        if writing:
            h.add_(1)
        return y

    torch.manual_seed(0)
    subject, writing = attached(Model(LAYERS[layer](), use).double()), False
    for x in batches()[:microbatch]:
        row_loss(subject.model, x).backward()
    writing = True
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        row_loss(subject.model, batches()[2]).backward()
    with pytest.raises(PrivacyError, match="Nothing was released"):
        subject.optimizer.step()


@pytest.mark.parametrize("microbatch", [0, 1])
def test_a_second_backward_is_refused(microbatch: int) -> None:
    subject = attached(model_of("linear", "plain"))
    for x in batches()[:microbatch]:
        row_loss(subject.model, x).backward()
    loss = row_loss(subject.model, batches()[2])
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="second backward"):
        loss.backward()


def test_a_graph_of_its_own_is_refused_where_groups_are_clipped_in_backward() -> None:
    """Seen to fail: its layer's group was complete before, and its gradient missing from the release."""
    subject = attached(model_of("linear", "in graphs of their own"), clipping="layer")
    with pytest.raises(UnsupportedModelError, match=r"backward inside of backward.*'flat'"):
        row_loss(subject.model, batches()[0]).backward()
    with pytest.raises(PrivacyError, match="Nothing was released"):
        subject.optimizer.step()


def written_in_backward(layer: nn.Module, h: Tensor, write: bool) -> Tensor:
    """A gradient that the layer's output shares with another branch, whose hook comes to it after the layer."""
    other = h.sin()
    y = layer(h) + other
    if write:
        other.register_hook(lambda g: g.mul_(2))
    return y


@pytest.mark.parametrize("where", ["gradient of the output", "input"])
def test_what_is_written_to_in_backward_is_refused_where_it_is_still_read(where: str) -> None:
    """A wide layer's factors are kept until the weights are known. Seen to fail: the release had another gradient."""
    wide = 60

    class InBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.x = x
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            if writes:
                ctx.x.mul_(3)
            return g

    def use(m: nn.Module, h: Tensor) -> Tensor:
        wider = F.pad(h[:, :1], (0, wide - D))
        if where == "input":
            wider = wider * 1
            branch = InBackward.apply(wider)  # type: ignore[no-untyped-call]
            return m(wider).sum(-1, keepdim=True) + branch.sum(-1, keepdim=True) * h
        return written_in_backward(m, wider, writes).sin().sum(-1, keepdim=True) * h

    torch.manual_seed(0)
    subject, writes = attached(Model(nn.Linear(wide, wide), use).double()), False
    for x in batches():
        row_loss(subject.model, x).backward()
        subject.step()
    writes = True
    with pytest.raises(UnsupportedModelError, match="was written to in backward"):
        row_loss(subject.model, batches()[0]).backward()
    with pytest.raises(PrivacyError, match="Nothing was released"):
        subject.optimizer.step()


class InTwoHalves(InGraphOfItsOwn):
    """A layer that is differentiated twice, in a graph that is kept."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        halves = [torch.autograd.grad(ctx.y, ctx.h, 0.5 * g, retain_graph=True)[0] for _ in range(2)]
        return None, halves[0] + halves[1]


class Scale(nn.Module):
    """A layer without a rule, which has a tap of its own in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(1, 2, D))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.scale


class Halved(nn.Module):
    """The layers of three blocks; one call of the first block is in vain."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(D, D), Scale(), nn.Linear(D, D)])

    def forward(self, h: Tensor) -> Tensor:
        self.blocks[0](h)
        return self.blocks[2](InTwoHalves.apply(self.blocks[1], self.blocks[0](h)).sin())  # type: ignore[no-any-return]


def test_a_layer_that_is_differentiated_twice_is_refused() -> None:
    """Seen to fail: the second half took the place of the first one in the release."""
    subject = attached(Halved().double())
    with pytest.raises(UnsupportedModelError, match="more often than forward"):
        row_loss(subject.model, batches()[0]).backward()
    with pytest.raises(PrivacyError, match="Nothing was released"):
        subject.optimizer.step()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own formulas
@pytest.mark.parametrize("layer", LAYERS)
def test_forward_differentiation_is_refused(layer: str) -> None:
    """The tangent has a node of its own. Seen to fail: the layer's part of its gradient was missing."""

    def use(m: nn.Module, h: Tensor) -> Tensor:
        with forward_ad.dual_level():
            y, tangent = forward_ad.unpack_dual(m(forward_ad.make_dual(h, h.sin())))
            assert tangent is not None
            return y + tangent

    torch.manual_seed(0)
    subject = attached(Model(LAYERS[layer](), use).double())
    with pytest.raises(NotImplementedError, match="jvp"):
        row_loss(subject.model, batches()[0])


def attached_and_remembered() -> tuple[Private, list[weakref.ref[Tensor]]]:
    """A model, and what the layer in its middle is given, call after call."""
    seen: list[weakref.ref[Tensor]] = []

    def use(m: nn.Module, h: Tensor) -> Tensor:
        seen.append(weakref.ref(h))
        return m(h)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    return attached(Model(nn.Linear(D, D), use).double()), seen


def test_a_forward_without_backward_keeps_nothing() -> None:
    """Seen to fail: the engine's reference to the nodes kept a whole graph until the next forward."""
    subject, seen = attached_and_remembered()
    row_loss(subject.model, batches()[0]).backward()
    subject.step()
    for x in batches()[1:]:
        loss = row_loss(subject.model, x)
        assert seen[-1]() is not None
        del loss
        assert seen[-1]() is None


def test_inputs_are_freed_in_backward() -> None:
    """By the nodes' functions, although the graph lives as long as the loss."""
    subject, seen = attached_and_remembered()
    for x in batches():
        loss = row_loss(subject.model, x)
        loss.backward()
    assert seen[-1]() is None
    del loss
