"""What the graph of a compiled block has of a layer's record: two inputs without memory, and two outputs of its backward.

A layer's *probes* are tensors that are made in front of the block's call, all by one node. In the graph the layer's output
goes through an identity (`_Handover`) whose backward returns (g, a), the gradient of the output and what the layer was given,
as the gradients of its probes; and the node is given them. So the graph has no side effect:

* what is recorded is an output, which cannot be dropped as dead code, be merged with another, or be made while tracing;
* the compiler gives outputs memory that it neither uses again nor takes for its own, so the engine keeps them as they are;
* ``a`` is saved for backward by the graph, so checkpointing and offloading around the block apply to it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fsdp_dp.errors import PrivacyError
from fsdp_dp.records import NO_CALL, Report

Leave = Callable[..., Any]


class Slot:
    """What a compiled graph finds at a layer.

    Attributes:
        leave: the layer's forward hook, which breaks graphs.
        hook_id: of the hook that stands for it.
        number: which of the probes that are handed out are its own, while its module is called; else -1.
        taken: the layer took them.
    """

    def __init__(self, leave: Leave) -> None:
        self.leave, self.hook_id = leave, -1
        self.number, self.taken = -1, False


class _HandedOut:
    """The probes (g, a) of each layer, in turn: not kept at the layers, for shapes of what modules hold never are dynamic."""

    def __init__(self) -> None:
        self.probes: list[Tensor] = []


HANDED_OUT = _HandedOut()


def recorded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook, the same function for all layers: the compiler guards what it reads here, but not which hook it is."""
    slot: Any = module._fsdp_dp_slot
    if torch.compiler.is_dynamo_compiling():
        if not torch.is_grad_enabled():
            return None
        if slot.number >= 0 and not slot.taken and not kwargs and len(args) == 1:
            g, a = HANDED_OUT.probes[2 * slot.number], HANDED_OUT.probes[2 * slot.number + 1]
            if _is_like(output, g) and _is_like(args[0], a):
                slot.taken = True
                return _hand_over(output, args[0], g, a)
    return slot.leave(module, args, kwargs, output)


def _is_like(x: Any, probe: Tensor) -> bool:
    return type(x) is Tensor and x.shape == probe.shape and x.dtype == probe.dtype


class _Handover(torch.autograd.Function):
    """Identity on a layer's output, in the graph; no view, so that the program may write to it. Inductor makes no copy."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, a: Tensor, probe_g: Tensor, probe_a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (a,) = ctx.saved_tensors
        return g, None, g, a


def _hand_over(output: Tensor, a: Tensor, probe_g: Tensor, probe_a: Tensor) -> Tensor:
    """Not traced into (see `prepare`): what is saved would be what the program writes to ``a`` later. Autograd refuses."""
    return _Handover.apply(output, a, probe_g, probe_a)  # type: ignore[no-any-return]


def prepare() -> None:
    """To be called before anything is compiled; not where this is imported, for it imports the compiler."""
    torch.compiler.allow_in_graph(_hand_over)


@dataclasses.dataclass(frozen=True)
class Form:
    """What a layer was given and gave."""

    g: torch.Size
    g_dtype: torch.dtype
    a: torch.Size
    a_dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Form | None:
        """None where probes would not do."""
        if kwargs or len(args) != 1 or type(output) is not Tensor or type(args[0]) is not Tensor:
            return None
        a = args[0]
        if not (a.is_floating_point() and output.is_floating_point() and a.device == output.device):
            return None  # ids are no gradient
        return Form(output.shape, output.dtype, a.shape, a.dtype, a.device)

    def probes(self) -> tuple[Tensor, Tensor]:
        return (
            torch.empty_strided(self.g, (0,) * len(self.g), dtype=self.g_dtype, device=self.device),
            torch.empty_strided(self.a, (0,) * len(self.a), dtype=self.a_dtype, device=self.device),
        )


class Probes(torch.autograd.Function):
    """The node in front of a call that makes its probes, and is given their gradients."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: Call) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        return tuple(probe for form in call.forms.values() for probe in form.probes())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None]:
        ctx.call.came(grads)
        return None, None


class Call:
    """One call of a compiled module.

    Attributes:
        forms: of layers that were given probes, in the order of their calls.
        tapped: how often layers were recorded by taps of their own.
        seen: what those were given.
        reports: of layers that took their probes.
    """

    def __init__(self, kind: Hashable) -> None:
        self.kind = kind
        self.forms: dict[str, Form] = {}
        self.tapped: Counter[str] = Counter()
        self.seen: dict[str, Form | None] = {}
        self.reports: dict[str, Report] = {}
        self._came = False

    def came(self, grads: Sequence[Tensor | None]) -> None:
        """The gradients of all probes, after the module's backward."""
        if self._came:
            raise PrivacyError(
                "backward came a second time to one call of a compiled module, whose rows would contribute twice; one "
                "backward of each forward is expected. Add the losses and call backward once"
            )
        self._came = True
        pairs = list(zip(self.forms, grads[::2], grads[1::2], strict=True))
        for name, g, a in reversed(pairs):
            if name not in self.reports:
                if g is not None or a is not None:
                    raise PrivacyError(f"Layer '{name}': a compiled graph recorded it, unknown to the engine")
            elif g is None or not g.numel():
                self.reports[name](NO_CALL, (), (None,))
            elif a is None:
                raise PrivacyError(f"Layer '{name}': a compiled graph gave its gradient without its input")
            else:
                self.reports[name](NO_CALL, (a.detach(),), (g.detach(),))

    def not_reached(self, *_: Any) -> None:
        for report in self.reports.values():
            report(NO_CALL, (), (None,))
