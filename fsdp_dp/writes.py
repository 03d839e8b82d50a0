"""Whether the tensors that a per-sample gradient is computed from are what they were: autograd counts writes to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from fsdp_dp.gradients import Materialized, OuterProduct, PerSampleGradient
from fsdp_dp.vector_gradients import SumOverPositions


def writes(gradient: PerSampleGradient) -> int:
    """How often they were written to; asked for each use of each parameter, so most kinds have a short way."""
    if type(gradient) is OuterProduct:
        return gradient.a_BTD._version + gradient.g_BTP._version
    if type(gradient) is Materialized:
        return gradient.value._version
    if type(gradient) is SumOverPositions:
        return gradient.g_BTC._version + (0 if gradient.a_BTC is None else gradient.a_BTC._version)
    return sum(x._version for x in _tensors_of((gradient,)))


def _tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, tuple):
            yield from _tensors_of(x)
        elif dataclasses.is_dataclass(x) and not isinstance(x, type):
            yield from _tensors_of(getattr(x, "__dict__", {}).values())
