"""One device, nothing sharded: the same path with the communication left out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fsdp_dp.numerics import accumulate_dtype
from fsdp_dp.sharding.base import ManagedParameter, Region, ShardedModel, trainable_names


class SingleDevice(ShardedModel):
    kind = "single device"

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        named = trainable_names(root)
        self.names = {site: name for name, sites in named.items() for site in sites}
        self.parameters = [_managed(name, index, *named[name][0]) for index, name in enumerate(sorted(named))]
        self._by_name = {p.name: p for p in self.parameters}
        self.unit_count = 1
        self.device = self.parameters[0].parameter.device if self.parameters else torch.device("cpu")
        self._global_numel = sum(p.parameter.numel() for p in self.parameters)

    def prepare_forward(self) -> None:
        """Nothing is left behind."""

    def start_accumulate(self, unit: int, gradients: Mapping[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            self._by_name[name].accumulator.add_(gradient.flatten())

    def finish_accumulate(self) -> None:
        """Nothing is in flight."""

    def publish(self, parameter: ManagedParameter, gradient: Tensor) -> None:
        p = parameter.parameter
        p.grad = gradient.view(p.shape).to(p.dtype)


def _managed(name: str, index: int, module: nn.Module, attribute: str) -> ManagedParameter:
    p = getattr(module, attribute)
    return ManagedParameter(
        name=name,
        index=index,
        parameter=p,
        numel=p.numel(),
        region=Region(start=0, count=p.numel()),
        split=False,
        unit=0,
        accumulator=torch.zeros(p.numel(), dtype=accumulate_dtype(p.dtype), device=p.device),
    )
