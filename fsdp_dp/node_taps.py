"""A tap without a place of its own in the graph: it listens to the operator that made a layer's output.

What `taps` puts behind an output costs the host as much as a layer does. A node of the graph can be asked to call a function
with the gradients that come to it, before it runs and after all hooks that may change them (see `come_last`); that is the
gradient with respect to the layer's own output, whatever the program did with it since. It is asked where this is the same as
a tap:

* the node was made by this call: the layer is of a type with a rule, whose forward ends in an operator of torch;
* its output is no view, which a write would give another node; or it is all of a product that the layer made;
* nobody packs saved tensors (activation checkpointing, offloading), of which the layer's input should be one;
* nothing is differentiated forward beside: tangents have nodes of their own, and a tap refuses them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.utils.hooks import RemovableHandle

from fsdp_dp.errors import PrivacyError
from fsdp_dp.records import NO_CALL, Report

_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks  # type: ignore[attr-defined]


def packing() -> bool:
    """Whether tensors that are saved for backward are packed now, as in a forward of checkpoint's and its recompute."""
    return _saved_tensors_hooks(True) is not None


def node_of(output: Tensor, is_product: bool) -> tuple[Any, Tensor] | None:
    """The node whose gradients are those of ``output``, and the tensor that it made; None where a tap is needed.

    Args:
        is_product: the layer is a Linear, whose output may be a view of a product.
    """
    if not output.requires_grad or packing():
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    made = output
    if output._is_view():
        base = output._base
        if not is_product or base is None or base.numel() != output.numel():
            return None
        made = base  # [rows * positions, outputs], of which no one else has seen anything
    node = made.grad_fn
    return None if node is None or isinstance(node, BackwardCFunction) else (node, made)


def come_last(handle: RemovableHandle) -> None:
    """Behind hooks of the program on the same node, which were registered later and may change the gradient."""
    hooks = handle.hooks_dict_ref()
    if hooks and next(reversed(hooks)) != handle.id:
        hooks[handle.id] = hooks.pop(handle.id)


class NodeTap:
    """One call of a layer: reports ``(input, gradient of the output)`` when backward comes to the node.

    Args:
        name: of the layer, for messages.
        shape: of the layer's output.
        number: which of the node's outputs it is.
    """

    __slots__ = ("_input", "_name", "_number", "_report", "_shape", "_version")

    def __init__(self, name: str, a: Tensor, report: Report, shape: torch.Size, number: int) -> None:
        self._name, self._version = name, a._version
        self._input: Tensor | None = a
        self._report, self._shape, self._number = report, shape, number

    def __call__(self, grads: tuple[Tensor | None, ...]) -> None:
        a, g = self._input, grads[self._number]
        if a is None:
            self._report(NO_CALL, (), (None,))
            raise PrivacyError(
                f"Layer '{self._name}': backward came a second time to one call of it, whose rows would contribute twice; "
                "one backward of each forward is expected. Add the losses and call backward once"
            )
        self._input = None  # the node lives as long as the loss
        if a._version != self._version:
            raise RuntimeError(
                f"Layer '{self._name}': what it was given has been modified by an inplace operation since, so its gradient "
                "cannot be computed; write to a copy"
            )
        found = None if g is None or not g.numel() else g if g.shape == self._shape else g.view(self._shape)
        self._report(NO_CALL, (a.detach(),), (found,))
