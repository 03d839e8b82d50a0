"""The gradients of biases and of norm layers' scales, which are sums over positions, before anybody has summed.

What they cost a GPU is launches, not bytes: a layer's rule gives what is to be summed, and `formed` makes all of a unit at
once, stored side by side, as the kernels want them that measure and sum over rows (`kernels.vectors`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from fsdp_dp.gradients import Materialized, PerSampleGradient
from fsdp_dp.kernels.position_sums import MOST_LAYERS, Layer, position_sums
from fsdp_dp.norm_terms import NormTerms


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
        alike.setdefault((x.g_BTC.dtype, x.g_BTC.shape[0]), {})[name] = x
    for vectors in alike.values():
        for portion in _portions(vectors):
            stored |= _formed(portion)
    return {name: stored.get(name, x) for name, x in gradients.items()}


def _portions(vectors: Mapping[str, SumOverPositions]) -> list[dict[str, SumOverPositions]]:
    """Such as one launch takes, a norm layer's shift with its scale."""
    portions: list[dict[str, SumOverPositions]] = [{}]
    layers = 0
    scaled: SumOverPositions | None = None
    for name, x in vectors.items():
        if scaled is None or x.a_BTC is not None or x.g_BTC is not scaled.g_BTC:
            if layers == MOST_LAYERS:
                portions.append({})
                layers = 0
            layers += 1
        scaled = x if x.a_BTC is not None else None
        portions[-1][name] = x
    return portions


def _formed(vectors: Mapping[str, SumOverPositions]) -> dict[str, Materialized]:
    """Of one portion, in one launch."""
    layers: list[Layer] = []
    scaled: SumOverPositions | None = None
    widths = []
    column = 0
    for x in vectors.values():
        g, a = x.g_BTC.contiguous(), x.a_BTC
        if a is not None:
            layers.append(Layer(g, a.contiguous(), x.eps, x.centered, column, -1))
        elif scaled is not None and x.g_BTC is scaled.g_BTC:
            layers[-1] = layers[-1]._replace(shift=column)
        else:
            layers.append(Layer(g, None, 0.0, False, -1, column))
        scaled = x if a is not None else None
        widths.append(g.shape[2])
        column += g.shape[2]
    pieces = position_sums(layers, column).split(widths, 1)
    return {name: Materialized(piece) for name, piece in zip(vectors, pieces, strict=True)}
