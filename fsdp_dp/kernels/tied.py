"""Whether the kernels for a table that is also the output head (`tied_triton`) take its factors, and the way to them.

`gradients.TiedSum` has the torch reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fsdp_dp.kernels import outer
from fsdp_dp.norm_terms import NormTerms

_FACTORS = (torch.bfloat16, torch.float16)


def usable(a_BSD: Tensor, g_BSV: Tensor, h_BTD: Tensor) -> bool:
    """Whether the kernels take a head's factors and a table's gradient ``h``; decided by type and shape alone.

    Any vocabulary and width, and any strides.
    """
    return (
        a_BSD.dtype == g_BSV.dtype
        and a_BSD.dtype in _FACTORS
        and h_BTD.dtype == torch.float32
        and min(a_BSD.numel(), g_BSV.numel(), h_BTD.numel()) > 0
        and outer._runs_on(a_BSD.device)
    )


def norm_terms(a_BSD: Tensor, g_BSV: Tensor, h_BTD: Tensor, index_BT: Tensor, head: NormTerms) -> NormTerms:
    """Of ``X + Y``: ``X = sum_s g_s a_s^T``, whose terms are ``head``, and Y with the row ``h_t`` at ``index_t``.

    Within a row of the microbatch, the indices of the ``h_t`` that are not zero are distinct.
    """
    from fsdp_dp.kernels import tied_triton as implementation

    return implementation.norm_terms(a_BSD, g_BSV, h_BTD, index_BT, head)
