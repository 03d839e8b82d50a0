"""What a tap keeps of one call of a layer, and how its tensors are told apart by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


@dataclasses.dataclass(frozen=True)
class Call:
    """How a layer was called, without its tensors: these travel through ``save_for_backward``.

    ``leaves`` and ``spec`` are the flattened ``(args, kwargs)``, with ``places`` of the tensors that were taken out.
    ``shared`` says of each of these, and ``gives_shared`` of the outputs, whether the layer had it without rows, for being
    the same for all (see `shared_values`); the record has it once a row. ``outputs`` are kept where a rule is to prove that
    it computes them.
    """

    leaves: tuple[Any, ...]
    spec: TreeSpec | None
    places: tuple[int, ...]
    autocast: bool = False
    shared: tuple[bool, ...] = ()
    gives_shared: bool = False
    outputs: tuple[Tensor, ...] | None = None

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any], *, first_only: bool) -> tuple[Call, list[Tensor]]:
        """The call and its tensors, or just the first argument for layers whose rule needs no more."""
        if first_only:
            return _FIRST, [args[0] if args else next(iter(kwargs.values()))]
        leaves, spec = tree_flatten((args, kwargs))
        places = tuple(i for i, x in enumerate(leaves) if isinstance(x, Tensor))
        tensors = [leaves[i] for i in places]
        rest = tuple(None if i in places else x for i, x in enumerate(leaves))
        autocast = torch.is_autocast_enabled(tensors[0].device.type if tensors else "cpu")
        return Call(rest, spec, places, autocast, (False,) * len(places)), tensors

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` again, with these tensors."""
        assert self.spec is not None
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.spec)  # type: ignore[no-any-return]


_FIRST = NO_CALL = Call((), None, ())


Report = Callable[[Call, tuple[Tensor, ...], tuple[Tensor | None, ...]], None]
"""What a tap calls in backward: the call, the inputs that it kept, the gradient of each output (None: unused)."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One call of a layer: what it was given, and the gradient with respect to each of its floating-point outputs.

    ``grads`` has None for an output that the loss does not use. ``layout`` says where the ``rows`` are in these.
    """

    call: Call
    inputs: tuple[Tensor, ...]
    grads: tuple[Tensor | None, ...]
    rows: int = 0
    layout: Layout = "rows"

    @property
    def a(self) -> Tensor:
        """The layer's first input."""
        return self.inputs[0]

    @property
    def g(self) -> Tensor:
        """The gradient of its only output."""
        (grad,) = self.grads
        assert grad is not None
        return grad

    def arranged(self, layout: Layout, rows: int) -> Record:
        """The same with rows (or entries of rows) in front, where a rule of the first input looks for them."""
        if layout != "second" or self.call.spec is not None:
            return Record(self.call, self.inputs, self.grads, rows, layout)
        return Record(self.call, (self.a.transpose(0, 1),), (self.g.transpose(0, 1),), rows)


Layout = Literal["rows", "merged", "second"]
"""Where the rows of a record's tensors are.

* ``rows``    dimension 0 is the row;
* ``merged``  dimension 0 counts ``k`` entries of the first row, then ``k`` of the second, ... (windows, patches, tokens);
* ``second``  dimension 1 is the row (sequence first).
"""


ALL_LAYOUTS: tuple[Layout, ...] = ("rows", "merged", "second")


def layout_of(shapes: Sequence[torch.Size], rows: int, allowed: Sequence[Layout] = ALL_LAYOUTS) -> Layout | None:
    """The layout that shapes of a record suggest, of those allowed; None if there is none.

    It is a guess that the engine verifies before the first release (see `independence`), and keeps from then on.
    """
    # [B windows, heads, T, D] with as many heads as rows is attention over windows; [T, B, D] is a sequence first.
    wide = any(len(shape) > 3 for shape in shapes)
    likely: tuple[Layout, ...] = ("rows", "merged", "second") if wide else ("rows", "second", "merged")
    return next((layout for layout in likely if layout in allowed and fits(layout, shapes, rows)), None)


def fits(layout: Layout, shapes: Sequence[torch.Size], rows: int) -> bool:
    """Whether tensors of these shapes can have their rows so."""
    if layout == "rows":
        return all(len(shape) > 0 and shape[0] == rows for shape in shapes)
    if layout == "second":
        # Sequence first has three dimensions, of which ids that are looked up have two.
        return all(shape[1:2] == (rows,) for shape in shapes) and any(len(shape) > 2 for shape in shapes)
    return all(len(shape) > 0 and shape[0] == shapes[0][0] and shape[0] % rows == 0 < shape[0] for shape in shapes)
