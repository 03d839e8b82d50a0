"""Whether the kernels for an embedding's per-sample gradients (`table_rows_triton`) take them, and the way to these.

`gradients.IndexedRows` has the torch reference, which goes over the same numbers some twelve times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fsdp_dp import kernels

_SUMMED_IN_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)


def compressible(index_BT: Tensor, g_BTP: Tensor) -> bool:
    """Whether `compress` takes them; decided by type and shape alone."""
    return g_BTP.dtype in _SUMMED_IN_FLOAT32 and g_BTP.numel() > 0 and kernels.available(g_BTP.device)


def summable(value_BTP: Tensor) -> bool:
    """Whether `weighted_sum` takes the values; its additions come in any order, as torch's do unless asked otherwise."""
    return compressible(value_BTP, value_BTP) and value_BTP.dtype == torch.float32 and not _wants_one_order()


def compress(index_BT: Tensor, g_BTP: Tensor) -> tuple[Tensor, Tensor]:
    """``index_BT`` int64 and ``value_BTP`` float32: gradients of equal indices of a row added up, in their order.

    As many slots are used as a row has different indices, the first ones; those behind hold index 0 and value 0.
    """
    from fsdp_dp.kernels import table_rows_triton as implementation

    return implementation.compress(index_BT, g_BTP)


def weighted_sum(index_BT: Tensor, value_BTP: Tensor, weight_B: Tensor, out: Tensor) -> None:
    """Add ``sum_i w_i value_it`` at ``index_it`` to ``out``, ``[V, P]`` or ``[W, V / W, P]`` float32 with a last stride of 1.

    Values are float32 and contiguous. Rows of weight zero are not looked at, and values that are zero not added.
    """
    from fsdp_dp.kernels import table_rows_triton as implementation

    implementation.weighted_sum(index_BT, value_BTP, weight_B, out)


def _wants_one_order() -> bool:
    return torch.are_deterministic_algorithms_enabled()
