"""A step of Opacus, as its own examples put it together, and in what its model is not the others'.

The mechanism is the one that `sides` runs: same bound, same noise, and a gradient that is the clipped sum over
``expected_batch_size`` rows of all ranks (Opacus counts the rows of one rank: it averages over ranks).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

from fsdp_dp.benchmark.cases import Case
from fsdp_dp.benchmark.models import Transformer, initialize

Data = list[tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism:
    """What every private side does to the same rows; `dtype` is of forward and backward."""

    max_grad_norm: float
    noise_multiplier: float
    expected_batch_size: int
    dtype: torch.dtype

    def options(self) -> dict[str, Any]:
        """Of an Opacus optimizer."""
        return {
            "max_grad_norm": self.max_grad_norm,
            "noise_multiplier": self.noise_multiplier,
            "expected_batch_size": self.expected_batch_size / dist.get_world_size(),
            "loss_reduction": "mean",
        }


def differs(case: Case) -> str | None:
    """In what this side does not run what the others run, in words."""
    if case.side == "opacus" and case.shape.tied:
        return "head not tied to the embedding: Opacus refuses tied weights under FSDP"
    if case.side == "opacus-hooks":
        return (
            "whole model on every GPU, float32 weights under autocast: Opacus has no FSDP for its per-sample gradients"
        )
    return None


def ghost(case: Case, data: Data, device: torch.device, mechanism: Mechanism) -> Callable[[], None]:
    """Ghost clipping with Opacus' FSDP2 wrapper (one unit a layer)."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping_fsdp import (
        GradSampleModuleFastGradientClippingFSDP,
    )
    from opacus.optimizers.fsdpoptimizer_fast_gradient_clipping import FSDPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
    from opacus.utils.fsdp_utils import FSDP2Wrapper

    with torch.device("meta"):
        model: Any = Transformer(case.shape, tied=False, checkpointing=case.checkpointing)
    policy = MixedPrecisionPolicy(param_dtype=mechanism.dtype, reduce_dtype=torch.float32)
    model = FSDP2Wrapper(model, mp_policy=policy)
    model.to_empty(device=device)
    initialize(model)
    model = GradSampleModuleFastGradientClippingFSDP(
        model, max_grad_norm=mechanism.max_grad_norm, loss_reduction="mean"
    )
    optimizer = FSDPOptimizerFastGradientClipping(torch.optim.AdamW(model.parameters(), lr=1e-4), **mechanism.options())
    backward = functools.partial(DPTensorFastGradientClipping, model, optimizer, loss_reduction="mean")

    def step() -> None:
        for index, (inputs, targets) in enumerate(data):
            backward(model(inputs, targets)).backward()
            optimizer.signal_skip_step(index < len(data) - 1)
            optimizer.step()
            optimizer.zero_grad()

    return step


def hooks(case: Case, data: Data, device: torch.device, mechanism: Mechanism) -> Callable[[], None]:
    """Every row's gradient of every parameter, kept until the norms are known; data-parallel."""
    from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DistributedDPOptimizer

    with torch.device(device):
        model: Any = Transformer(case.shape, tied=case.shape.tied, checkpointing=case.checkpointing)
    initialize(model)
    model = GradSampleModule(DifferentiallyPrivateDistributedDataParallel(model), loss_reduction="mean")
    optimizer = DistributedDPOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4), **mechanism.options())
    lower = mechanism.dtype != torch.float32

    def step() -> None:
        for index, (inputs, targets) in enumerate(data):
            with torch.autocast(device.type, mechanism.dtype, enabled=lower):
                losses = model(inputs, targets)
            losses.mean().backward()
            optimizer.signal_skip_step(index < len(data) - 1)
            optimizer.step()
            optimizer.zero_grad()

    return step
