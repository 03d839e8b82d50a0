"""RMSNorm as models of Hugging Face have it, one class a model: ``x / rms(x)`` in float32, times the scale or one more."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from fsdp_dp.gradients import PerSampleGradient
from fsdp_dp.kernels import position_sums
from fsdp_dp.layers.linear import positions
from fsdp_dp.layers.normalization import scale_and_shift
from fsdp_dp.layers.registry import forward_rule
from fsdp_dp.numerics import accumulate_dtype
from fsdp_dp.vector_gradients import SumOverPositions


def _rms_norm(
    module: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str], *, eps: str, in_its_format: bool = False
) -> dict[str, PerSampleGradient]:
    """Stored for every row, as of nn.RMSNorm."""
    epsilon = float(getattr(module, eps))
    if position_sums.normalizes(a, g, a.shape[-1:]):
        return {"weight": SumOverPositions(positions(g), positions(a), epsilon, False)}
    x, dtype = a.to(torch.float32), accumulate_dtype(a.dtype)
    deviation = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    normalized = a.to(dtype) * deviation if in_its_format else (x * deviation).to(dtype)
    return scale_and_shift(normalized, g.to(dtype), 1, wanted)


# What each forward says, and where it is from. None of them depends on the mode, or keeps anything.
for _fingerprint, _eps, _in_its_format in (
    ("075c8d1982795b4a", "variance_epsilon", False),  # Llama, and most after it
    ("2c29d28177dec537", "variance_epsilon", False),  # OLMo 2
    ("f3c969785666d4c0", "variance_epsilon", False),  # Helium
    ("40ddde48b8298bc4", "eps", False),  # Gemma: times 1 + weight
    ("27d5a8f504377ce5", "eps", False),  # Moshi
    ("d85ad53cd5273db1", "variance_epsilon", True),  # T5
):
    forward_rule(_fingerprint)(functools.partial(_rms_norm, eps=_eps, in_its_format=_in_its_format))
