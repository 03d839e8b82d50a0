"""Convolutions: an outer product over patches of the input, and sums over positions."""

from __future__ import annotations

from torch import Tensor, nn

from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.gradients import Materialized, PerSampleGradient
from fsdp_dp.layers.registry import layer_rule
from fsdp_dp.numerics import accumulate_dtype
from fsdp_dp.patches import Geometry, PatchProduct


@layer_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, layouts=("rows", "merged"))
def convolution(module: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """An outer product over patches, cut when needed. All strides, dilations, groups, paddings and padding modes."""
    assert isinstance(module, nn.modules.conv._ConvNd)
    if a.ndim != len(module.kernel_size) + 2:
        raise UnsupportedModelError(
            f"A {type(module).__name__} was given an input of shape {tuple(a.shape)} without a batch dimension; give it "
            f"{len(module.kernel_size) + 2} dimensions, [rows, channels, ...]"
        )
    out: dict[str, PerSampleGradient] = {}
    if "weight" in wanted:
        out["weight"] = PatchProduct(a, g, geometry(module))
    if "bias" in wanted:
        out["bias"] = Materialized(g.flatten(2).sum(2, dtype=accumulate_dtype(g.dtype)))
    return out


def geometry(module: nn.Module) -> Geometry:
    assert isinstance(module, nn.modules.conv._ConvNd)
    return Geometry(
        kernel=module.kernel_size,
        stride=module.stride,
        dilation=module.dilation,
        # What torch itself pads by where the mode is not zeros; it holds for "same" and "valid" as well.
        padding=tuple(module._reversed_padding_repeated_twice),
        padding_mode=module.padding_mode,
        groups=module.groups,
    )
