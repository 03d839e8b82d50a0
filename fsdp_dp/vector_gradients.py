"""The gradients of biases and of norm layers' scales, which are sums over positions, before anybody has summed.

What they cost a GPU is launches, not bytes: a layer's rule gives what is to be summed, and `formed` makes all of a unit at
once, stored side by side, as the kernels want them that measure and sum over rows (`kernels.vectors`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from fsdp_dp.gradients import Materialized, NormTerms, PerSampleGradient
from fsdp_dp.kernels.position_sums import MOST_LAYERS, Layer, position_sums


@dataclasses.dataclass(frozen=True)
class SumOverPositions:
    """``G_i = sum_t g_it x_it`` ``[C]``, where x is ``a_BTC`` normalized, or 1 without that; on a GPU.

    ``eps`` and ``centered`` say how a norm layer normalizes (see `kernels.position_sums`).
    """

    g_BTC: Tensor
    a_BTC: Tensor | None = None
    eps: float = 0.0
    centered: bool = False
    method: ClassVar[str] = "store"
    norm_cost: ClassVar[float] = 0.0

    def formed(self) -> Materialized:
        return _formed({"": self})[""]

    def norm_terms(self) -> NormTerms:
        return self.formed().norm_terms()

    def weighted_sum(self, weight_B: Tensor, keep_B: Tensor) -> Tensor:
        return self.formed().weighted_sum(weight_B, keep_B)

    def dense(self) -> Tensor:
        return self.formed().value

    def regroup(self, rows: int) -> SumOverPositions:
        g, a = (None if x is None else x.reshape(rows, -1, x.shape[2]) for x in (self.g_BTC, self.a_BTC))
        assert g is not None
        return dataclasses.replace(self, g_BTC=g, a_BTC=a)

    def settle(self) -> SumOverPositions:
        return self


def formed(gradients: Mapping[str, PerSampleGradient]) -> Mapping[str, PerSampleGradient]:
    """The same with all `SumOverPositions` stored, side by side in their order, in as few launches as possible."""
    waiting = {name: x for name, x in gradients.items() if type(x) is SumOverPositions}
    if not waiting:
        return gradients
    stored: dict[str, PerSampleGradient] = {}
    alike: dict[tuple[object, ...], dict[str, SumOverPositions]] = {}
    for name, x in waiting.items():
        alike.setdefault((x.g_BTC.dtype, len(x.g_BTC)), {})[name] = x
    for vectors in alike.values():
        names = list(vectors)
        for first in range(0, len(names), MOST_LAYERS):
            stored |= _formed({name: vectors[name] for name in names[first : first + MOST_LAYERS]})
    return {name: stored.get(name, x) for name, x in gradients.items()}


def _formed(vectors: Mapping[str, SumOverPositions]) -> dict[str, Materialized]:
    """Of at most `MOST_LAYERS`, in one launch; a norm layer's shift is made where its scale is."""
    layers: list[Layer] = []
    of_output: dict[tuple[int, ...], int] = {}
    widths = []
    column = 0
    for x in vectors.values():
        g, a = x.g_BTC.contiguous(), x.a_BTC
        output = (g.data_ptr(), *g.shape)
        norm = of_output.pop(output, None) if a is None else None
        if norm is not None:
            layers[norm] = layers[norm]._replace(shift=column)
        elif a is None:
            layers.append(Layer(g, None, 0.0, False, -1, column))
        else:
            of_output[output] = len(layers)
            layers.append(Layer(g, a.contiguous(), x.eps, x.centered, column, -1))
        widths.append(g.shape[2])
        column += g.shape[2]
    pieces = position_sums(layers, column).split(widths, 1)
    return {name: Materialized(piece) for name, piece in zip(vectors, pieces, strict=True)}
