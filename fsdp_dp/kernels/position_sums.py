"""Whether the kernel that sums over positions (`position_sums_triton`) takes a layer's factors, and the way to it.

Biases and norm layers are many and small: what their gradients cost is launches, so those of a unit are made in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fsdp_dp import kernels
from fsdp_dp.numerics import accumulate_dtype

MOST_COLUMNS = 8192
"""Of a layer that is normalized: a program has whole positions."""

MOST_LAYERS = 8
"""That one launch is told of."""


class Layer(NamedTuple):
    """Of whose output gradients ``g`` to make ``sum_t g_t x_t`` and ``sum_t g_t``.

    Attributes:
        g_BTC, a_BTC: contiguous, of one dtype; ``x`` is ``a`` normalized. Without ``a``, nothing but the second sum.
        eps, centered: as the layer normalizes; ``centered`` tells LayerNorm from RMSNorm.
        scale, shift: first columns of the two sums; -1 where one is not asked for.
    """

    g_BTC: Tensor
    a_BTC: Tensor | None
    eps: float
    centered: bool
    scale: int
    shift: int


def usable(g: Tensor) -> bool:
    """Whether output gradients ``[B, ..., C]`` can be summed by the kernel; decided by type and shape alone."""
    return g.numel() > 0 and accumulate_dtype(g.dtype).itemsize == 4 and kernels.available(g.device)


def normalizes(a: Tensor, g: Tensor, normalized_shape: Sequence[int]) -> bool:
    """The same of a norm layer with input ``a``."""
    return (
        len(normalized_shape) == 1
        and a.shape == g.shape
        and a.ndim > 1
        and a.shape[-1] <= MOST_COLUMNS
        and a.dtype == g.dtype
        and usable(g)
    )


def position_sums(layers: Sequence[Layer], columns: int) -> Tensor:
    """``[B, columns]`` float32: the sums of at most `MOST_LAYERS` layers of one dtype and B, side by side."""
    from fsdp_dp.kernels import position_sums_triton as implementation

    return implementation.position_sums(layers, columns)
