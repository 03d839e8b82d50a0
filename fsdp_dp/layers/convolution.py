"""Convolutions: an outer product over patches of the input, and sums over positions.

A transposed convolution is the adjoint of a convolution, so that input and output gradient change places.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.gradients import Materialized, PerSampleGradient
from fsdp_dp.layers.registry import layer_rule
from fsdp_dp.numerics import accumulate_dtype
from fsdp_dp.patches import Geometry, PatchProduct


def _of_one_image(module: nn.Module) -> int:
    assert isinstance(module, nn.modules.conv._ConvNd)
    return len(module.kernel_size) + 1


@layer_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, layouts=("rows", "merged"), unbatched=_of_one_image)
def convolution(module: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """An outer product over patches, cut when needed. All strides, dilations, groups, paddings and padding modes."""
    _check_batch(module, a)
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


@layer_rule(
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, layouts=("rows", "merged"), unbatched=_of_one_image
)
def transposed_convolution(
    module: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str]
) -> dict[str, PerSampleGradient]:
    """As for a convolution, with patches of the output gradient. All strides, dilations, groups and (output) paddings."""
    assert isinstance(module, nn.modules.conv._ConvTransposeNd)
    _check_batch(module, a)
    out: dict[str, PerSampleGradient] = {}
    if "weight" in wanted:
        padding: list[int] = []
        assert not isinstance(module.padding, str)
        steps = zip(module.kernel_size, module.stride, module.dilation, module.padding, strict=True)
        for (kernel, stride, dilation, before), n, m in zip(steps, a.shape[2:], g.shape[2:], strict=True):
            span = (n - 1) * stride + dilation * (kernel - 1) + 1  # of all windows; output_padding lies behind them
            padding = [before, span - m - before, *padding]
        adjoint = dataclasses.replace(geometry(module), padding=tuple(padding))
        out["weight"] = PatchProduct(g, a, adjoint)
    if "bias" in wanted:
        out["bias"] = Materialized(g.flatten(2).sum(2, dtype=accumulate_dtype(g.dtype)))
    return out


def _check_batch(module: nn.Module, a: Tensor) -> None:
    if a.ndim != _of_one_image(module) + 1:
        raise UnsupportedModelError(
            f"A {type(module).__name__} was given an input of shape {tuple(a.shape)} without a batch dimension; give it "
            f"{_of_one_image(module) + 1} dimensions, [rows, channels, ...]"
        )
