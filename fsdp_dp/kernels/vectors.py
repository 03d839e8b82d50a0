"""Whether the kernels for stored gradients of vectors (`vectors_triton`) take them, and the way to these.

Biases and the scales of norm layers are many and small: what they cost is launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fsdp_dp import kernels


def usable(x: Tensor) -> bool:
    """Whether the kernels take stored gradients ``[B, ...]`` like this one."""
    return x.dtype == torch.float32 and kernels.available(x.device)


def squared_norms(joined_BN: Tensor, widths: Sequence[int], owners: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """``[k, 3, B]`` float64, each as `NormTerms.stack`, and whose each of the k is.

    Args:
        joined_BN: float32, vectors side by side, with a last stride of 1; those of an owner stand together.
        widths: of the vectors; ``owners``: which group each is in.
    """
    from fsdp_dp.kernels import vectors_triton as implementation

    return implementation.squared_norms(joined_BN, tuple(widths), tuple(owners))


def weighted_sum(
    joined_BN: Tensor,
    weight_KB: Tensor,
    widths: Sequence[int],
    owners: Sequence[int],
    places: Sequence[Tensor] = (),
) -> Tensor:
    """``sum_i w_i x_i`` ``[N]`` float32, with each vector's owner's weights; rows of weight zero are not looked at.

    ``places`` are where the sums of the vectors go, ``[shards, width / shards]`` of one memory and strides; then what is
    returned holds nothing.
    """
    from fsdp_dp.kernels import vectors_triton as implementation

    return implementation.weighted_sum(joined_BN, weight_KB, tuple(widths), tuple(owners), places)
