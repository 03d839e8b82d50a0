"""Modules that torch computes as a whole, from parameters of its own: their products become layers, with Linear's rule.

Such a module keeps its parameters, its place and its class's name, and is given a forward that computes the same from
`Part`s. These own nothing and are in no module tree: names, state dicts and FSDP units stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn


class Part(nn.Module):
    """``x W^T + b`` with two parameters of its ``owner``.

    Attributes:
        forward_of_owner: the owner's forward, which calls its parts by ``self._parts[name]``.
        documented_as: what the owner is called in lists of layers.
    """

    owner: nn.Module
    forward_of_owner: ClassVar[Callable[..., Any]]
    documented_as: ClassVar[str]

    def __init__(self, owner: nn.Module, weight_name: str, bias_name: str | None) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # not a submodule
        self.weight_name, self.bias_name = weight_name, bias_name

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias_name is None else getattr(self.owner, self.bias_name)
        return F.linear(x, getattr(self.owner, self.weight_name), bias)


class Opened:
    """Gives modules the forward that calls their parts, until `remove`.

    torch's encoders take their own fast path, in eval mode, only where no module in them has a hook: here all do.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._classes: dict[nn.Module, type[nn.Module]] = {}
        for name, layer in layers.items():
            if isinstance(layer, Part):
                self._open(layer.owner, type(layer).forward_of_owner)
                layer.owner.__dict__["_parts"][name.rpartition(".")[2]] = layer

    def _open(self, owner: nn.Module, forward: Callable[..., Any]) -> None:
        if owner not in self._classes:
            kind = self._classes[owner] = type(owner)
            owner.__dict__["_parts"] = {}
            owner.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})

    def remove(self) -> None:
        for owner, kind in self._classes.items():
            owner.__class__ = kind
            del owner.__dict__["_parts"]
