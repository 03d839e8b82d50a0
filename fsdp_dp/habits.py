"""What a layer's records are like, microbatch after microbatch: what was found out of one need not be asked of the next.

Where the rows are, which rule holds and whether a gradient is stored follow from shapes and formats alone, and from the
layouts that hold now: `RowLayouts` has another object as soon as others do. The host needs as long for these questions as
for the launches that follow them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fsdp_dp.gradients import OuterProduct, PerSampleGradient, settled
from fsdp_dp.layers import rule_for
from fsdp_dp.numerics import exact_arithmetic
from fsdp_dp.records import NO_CALL, Call
from fsdp_dp.vector_gradients import SumOverPositions

Form = tuple[Any, ...]


def form_of(call: Call, inputs: Sequence[Tensor], grads: Sequence[Tensor | None], rows: int) -> Form | None:
    """Shapes and formats of a record of one plain input and one plain output; None of any other record."""
    if call is not NO_CALL or len(grads) != 1 or len(inputs) != 1:
        return None
    a, g = inputs[0], grads[0]
    if g is None or type(a) is not Tensor or type(g) is not Tensor:
        return None
    return a.shape, g.shape, a.dtype, g.dtype, rows


class Habit:
    """What holds for the records of one layer that have this form, rows in front, as long as the layouts are the same.

    Args:
        layouts: `RowLayouts.fixed` when this was found out.
        device: of forward and backward.
        found: the gradients of the record that it was found out of.
        settles: some of the gradients are kept in another form than the rule's (`gradients.settled`).
        brief: the parameters whose gradients are not kept for long.
    """

    __slots__ = (
        "_brief",
        "_computes",
        "_device",
        "_module",
        "_plans",
        "_rule",
        "_settles",
        "_wanted",
        "form",
        "layouts",
    )

    def __init__(
        self,
        form: Form,
        module: nn.Module,
        wanted: frozenset[str],
        layouts: Mapping[Any, Any],
        device: torch.device,
        found: Mapping[str, PerSampleGradient],
        *,
        settles: bool,
        brief: frozenset[str] = frozenset(),
    ) -> None:
        self.form, self.layouts = form, layouts
        self._module, self._rule, self._wanted, self._device = module, rule_for(module), wanted, device
        self._plans: dict[str, dict[str, Any]] = {}
        self._settles, self._brief = settles, brief
        self._computes = settles or not all(type(gradient) in _UNTOUCHED for gradient in found.values())

    def gradients(self, a: Tensor, g: Tensor | None) -> Mapping[str, PerSampleGradient]:
        """``{parameter name: gradient of every row}``, as `layers.per_sample_gradients` gives them, settled."""
        if self._computes:
            with exact_arithmetic(self._device):
                return self._of_rule(a, g)
        return self._of_rule(a, g)

    def _of_rule(self, a: Tensor, g: Tensor | None) -> Mapping[str, PerSampleGradient]:
        found: dict[str, PerSampleGradient] = self._rule(self._module, a, g, self._wanted)
        for name, gradient in found.items():
            if type(gradient) is OuterProduct:
                plan = self._plans.get(name)
                if plan is None:
                    self._plans[name] = gradient.plan
                else:
                    gradient.adopt(plan)
        if not self._settles:
            return found
        return {name: settled(gradient, soon=name in self._brief) for name, gradient in found.items()}


_UNTOUCHED = (OuterProduct, SumOverPositions)
"""What rules return without having computed anything: references to factors."""
