"""Norm layers: scale and shift gradients are small, so they are stored for every row, on a GPU once a unit is complete."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.gradients import Materialized, PerSampleGradient
from fsdp_dp.kernels import position_sums
from fsdp_dp.layers.linear import positions
from fsdp_dp.layers.registry import layer_rule
from fsdp_dp.numerics import accumulate_dtype
from fsdp_dp.vector_gradients import SumOverPositions


def _over_positions(x: Tensor, parameter_dims: int) -> Tensor:
    """Sum ``[B, ..., *shape]`` over everything between the row and the parameter's shape."""
    middle = tuple(range(1, x.ndim - parameter_dims))
    return x.sum(middle) if middle else x


@layer_rule(nn.LayerNorm)
def layer_norm(module: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """Stored for every row."""
    assert isinstance(module, nn.LayerNorm)
    if position_sums.normalizes(a, g, module.normalized_shape):
        return _over_all_positions(a, g, module.eps, wanted, centered=True)
    dtype = accumulate_dtype(a.dtype)
    normalized = F.layer_norm(a.to(dtype), module.normalized_shape, None, None, module.eps)
    return scale_and_shift(normalized, g.to(dtype), len(module.normalized_shape), wanted)


@layer_rule(nn.RMSNorm)
def rms_norm(module: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """Stored for every row."""
    assert isinstance(module, nn.RMSNorm)
    if position_sums.normalizes(a, g, module.normalized_shape):
        eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
        return _over_all_positions(a, g, eps, wanted, centered=False)
    dtype = accumulate_dtype(a.dtype)
    # eps=None: torch takes that of the format it computes in, float32 for half precision, which is ours.
    normalized = F.rms_norm(a.to(dtype), module.normalized_shape, None, module.eps)
    return scale_and_shift(normalized, g.to(dtype), len(module.normalized_shape), wanted)


def _over_all_positions(
    a: Tensor, g: Tensor, eps: float, wanted: frozenset[str], *, centered: bool
) -> dict[str, PerSampleGradient]:
    a_BTC, g_BTC = positions(a), positions(g)
    found = {"weight": SumOverPositions(g_BTC, a_BTC, eps, centered), "bias": SumOverPositions(g_BTC)}
    return {name: found[name] for name in found if name in wanted}


def scale_and_shift(x: Tensor, g: Tensor, dims: int, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """Of ``x`` normalized, both stored."""
    out: dict[str, PerSampleGradient] = {}
    if "weight" in wanted:
        out["weight"] = Materialized(_over_positions(g * x, dims))
    if "bias" in wanted:
        out["bias"] = Materialized(_over_positions(g, dims))
    return out


@layer_rule(nn.GroupNorm, layouts=("rows", "merged"), unbatched=lambda module: 0)
def group_norm(module: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """Stored for every row."""
    assert isinstance(module, nn.GroupNorm)
    dtype = accumulate_dtype(a.dtype)
    normalized = F.group_norm(a.to(dtype), module.num_groups, None, None, module.eps)
    return _of_channels(normalized, g.to(dtype), wanted)


def _keeps_no_statistics(module: nn.Module) -> str | None:
    assert isinstance(module, nn.modules.instancenorm._InstanceNorm)
    if module.track_running_stats:
        return "track_running_stats=True keeps statistics of the data, un-noised, in buffers; set it to False"
    return None


def _of_one_image(module: nn.Module) -> int:
    assert isinstance(module, nn.modules.instancenorm._InstanceNorm)
    return module._get_no_batch_dim()


@layer_rule(
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, check=_keeps_no_statistics, layouts=("rows", "merged"),
    unbatched=_of_one_image,
)  # fmt: skip
def instance_norm(module: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """Stored for every row. Not with track_running_stats."""
    assert isinstance(module, nn.modules.instancenorm._InstanceNorm)
    dtype = accumulate_dtype(a.dtype)
    if a.ndim != _of_one_image(module) + 1:
        raise UnsupportedModelError(
            f"A {type(module).__name__} was given an input of shape {tuple(a.shape)} without a batch dimension; give it "
            f"{_of_one_image(module) + 1} dimensions, [rows, channels, ...]"
        )
    return _of_channels(F.instance_norm(a.to(dtype), eps=module.eps), g.to(dtype), wanted)


def _of_channels(x: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """Scale and shift of ``[B, C, ...]`` channel by channel."""
    return scale_and_shift(x.movedim(1, -1), g.movedim(1, -1), 1, wanted)
