"""RMSNorm as models of Hugging Face have it, one class a model: ``x / rms(x)`` in float32, times the scale or one more."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.gradients import Materialized, PerSampleGradient
from fsdp_dp.kernels import position_sums
from fsdp_dp.layers.linear import positions
from fsdp_dp.layers.normalization import scale_and_shift
from fsdp_dp.layers.registry import forward_rule
from fsdp_dp.numerics import accumulate_dtype
from fsdp_dp.vector_gradients import SumOverPositions


def _rms_norm(
    module: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str], *, eps: str, in_its_format: bool = False
) -> dict[str, PerSampleGradient]:
    """Stored for every row, as of nn.RMSNorm; a scale of any shape that was broadcast (one a head) is, too."""
    epsilon, shape = float(getattr(module, eps)), _shape_of_scale(module)
    if shape == a.shape[-1:] and position_sums.normalizes(a, g, a.shape[-1:]):
        return {"weight": SumOverPositions(positions(g), positions(a), epsilon, False)}
    x, dtype = a.to(torch.float32), accumulate_dtype(a.dtype)
    deviation = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    normalized = a.to(dtype) * deviation if in_its_format else (x * deviation).to(dtype)
    if shape == a.shape[-1:]:
        return scale_and_shift(normalized, g.to(dtype), 1, wanted)
    return {"weight": Materialized(_summed_to(g.to(dtype) * normalized, shape, type(module).__name__))}


def _shape_of_scale(module: nn.Module) -> torch.Size:
    """Past what gives the program another value where it reads a parameter itself (see `outside_reads`)."""
    scale = module.__dict__.get("weight", module._parameters.get("weight"))
    assert isinstance(scale, Tensor)
    return scale.shape


def _summed_to(x: Tensor, shape: torch.Size, kind: str) -> Tensor:
    """``[B, ..., C]`` to ``[B, *shape]``, what was broadcast to all but the rows added up."""
    own = shape[max(0, len(shape) - (x.ndim - 1)) :]
    between = x.ndim - len(own)
    fits = all(n in (1, m) for n, m in zip(own, x.shape[between:], strict=True))
    if not fits or any(n != 1 for n in shape[: len(shape) - len(own)]):
        raise UnsupportedModelError(
            f"{kind} has a scale of shape {list(shape)}, which does not fit a row of what it is given, {list(x.shape)} for "
            "all rows; give it a scale that is the same for all rows"
        )
    added = [i for i in range(1, x.ndim) if i < between or own[i - between] == 1]
    return (x.sum(added) if added else x).reshape(x.shape[0], *shape)


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
