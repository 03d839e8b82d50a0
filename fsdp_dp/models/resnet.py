"""A residual network for images with GroupNorm, which keeps rows apart as batch normalisation does not.

Shapes: B samples, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_dp.models.config import ResNetConfig


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut: x_BCHW -> y_BDhw. One FSDP unit."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs)
        self.convolution1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.convolution2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BDhw = self.convolution1(F.relu(self.norm1(x_BCHW)))
        return self.shortcut(x_BCHW) + self.convolution2(F.relu(self.norm2(y_BDhw)))


class ResNet(nn.Module):
    """Images_BCHW, about -1 to 1 -> logits_BK."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.stem = nn.Conv2d(config.channels, config.width, 3, padding=1, bias=False)
        blocks, inputs = [], config.width
        for stage in range(config.stages):
            outputs = config.width * 2**stage
            for block in range(config.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(ResidualBlock(inputs, outputs, stride, config.groups))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.GroupNorm(config.groups, inputs)
        self.head = nn.Linear(inputs, config.classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.stem(x_BCHW)
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        return self.head(F.relu(self.norm(x_BCHW)).mean(dim=(2, 3)))
