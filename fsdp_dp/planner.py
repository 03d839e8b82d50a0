"""How a Linear's per-sample gradients are measured: chosen for each layer, from its shape alone.

* ``gram``         two T x T Gram matrices; the gradient of a row is never formed;
* ``instantiate``  the gradient of each row, formed, measured and dropped;
* ``store``        the same, kept in place of its factors: what is summed is what was measured;
* ``round``        the same, rounded to bfloat16 and measured then, as plain training rounds a microbatch's: only until the
                   block's weights are known.

The shape decides and never the data: a choice that one row could change would change all other rows' rounding with it
(docs/numerics.md). ``gram`` and ``instantiate`` multiply a second time when the weights are known.
"""

from __future__ import annotations

import functools
from typing import Literal

Method = Literal["gram", "instantiate", "store", "round"]

STORE_AT_MOST = 1.5
"""A gradient that its norm needs is kept if it takes at most this many times the room of its factors."""

# Rates of one H100 in the kernels and cuBLAS (docs/performance.md): only their ratios matter.
_PRODUCTS, _WEIGHTED_PRODUCTS, _GRAM_PRODUCTS = 720e12, 640e12, 510e12
_BYTES = 2.6e12
_ROUNDED_BYTES = 2
_GRAM_TILE = 128


@functools.cache
def method(T: int, D: int, P: int, factor_bytes: int, sum_bytes: int, *, fused: bool, rounds: bool = False) -> Method:
    """The method for ``a [T, D]`` and ``g [T, P]`` a row.

    Args:
        factor_bytes: of an element of a and g; ``sum_bytes`` of one of the gradient.
        fused: the kernels of `kernels.outer` do the work; otherwise whole matrix products do.
        rounds: a gradient may be kept rounded, which is not for long.
    """
    room = STORE_AT_MOST * T * (D + P) * factor_bytes
    fits = D * P * sum_bytes <= room
    if fused:
        times = _seconds(T, D, P, sum_bytes)
        may = {"gram": True, "instantiate": True, "store": fits, "round": rounds and room >= D * P * _ROUNDED_BYTES}
        return min((name for name in times if may[name]), key=times.__getitem__)
    if T * (D + P) < D * P:
        return "gram"
    return "store" if fits else "instantiate"


def _seconds(T: int, D: int, P: int, sum_bytes: int) -> dict[Method, float]:
    """Modelled time of a row's norm and of its part in the weighted sum."""
    tiles = -(-T // _GRAM_TILE)
    gram = tiles * (tiles + 1) * _GRAM_TILE**2 * (D + P) / _GRAM_PRODUCTS
    formed, once = 2 * T * D * P / _PRODUCTS, D * P * sum_bytes / _BYTES
    weighted = 2 * T * D * P / _WEIGHTED_PRODUCTS
    return {
        "gram": gram + weighted,
        "instantiate": formed + 2 * once + weighted,
        "store": formed + 3 * once,
        "round": formed + 2 * D * P * _ROUNDED_BYTES / _BYTES,
    }
