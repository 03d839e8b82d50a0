"""The gradients of biases and of norm layers' scales, which are sums over positions, before anybody has summed.

What they cost is launches and the host's time, not bytes: a layer's rule gives what is to be summed, and `formed` makes all
of a unit at once. They stay side by side from there on, as the kernels want them that measure and sum over rows
(`kernels.vectors`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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
        return Materialized(_formed({"": self}).value_BN)

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


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """Vectors that one launch formed: columns of ``value_BN``, as many of each name as ``widths`` says, in its order."""

    value_BN: Tensor
    widths: Mapping[str, int]

    def apart(self) -> dict[str, PerSampleGradient]:
        """As gradients of their own."""
        pieces = self.value_BN.split(list(self.widths.values()), 1)
        return {name: Materialized(piece) for name, piece in zip(self.widths, pieces, strict=True)}


def formed(
    gradients: Mapping[str, PerSampleGradient],
) -> tuple[Mapping[str, PerSampleGradient], Sequence[SideBySide]]:
    """Those that are no `SumOverPositions`, and those that were, stored in as few launches as possible."""
    waiting = {name: x for name, x in gradients.items() if type(x) is SumOverPositions}
    if not waiting:
        return gradients, ()
    alike: dict[tuple[object, ...], dict[str, SumOverPositions]] = {}
    for name, x in waiting.items():
        shape = x.g_BTC.shape
        alike.setdefault((x.g_BTC.dtype, shape[0]), {})[name] = x
    stored = [_formed(portion) for vectors in alike.values() for portion in _portions(vectors)]
    return {name: x for name, x in gradients.items() if name not in waiting}, stored


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


def _formed(vectors: Mapping[str, SumOverPositions]) -> SideBySide:
    """Of one portion, in one launch."""
    layers: list[Layer] = []
    scaled: SumOverPositions | None = None
    widths: dict[str, int] = {}
    column = 0
    for name, x in vectors.items():
        if x.a_BTC is not None:
            layers.append(Layer(x.g_BTC.contiguous(), x.a_BTC.contiguous(), x.eps, x.centered, column, -1))
            scaled = x
        else:
            if scaled is not None and x.g_BTC is scaled.g_BTC:
                layers[-1] = layers[-1]._replace(shift=column)
            else:
                layers.append(Layer(x.g_BTC.contiguous(), None, 0.0, False, -1, column))
            scaled = None
        width = widths[name] = x.g_BTC.shape[2]
        column += width
    return SideBySide(position_sums(layers, column), widths)
