"""The benchmark's sides do the same work: in float32 and without noise, Opacus' gradient is ours."""

import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fsdp_dp.benchmark import cases, peers, sides
from tests.distributed.harness import run

CPU = torch.device("cpu")


@torch.no_grad()
def named_weights(model: nn.Module) -> None:
    """The same weights whether or not they are sharded, out of their names."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.removeprefix("_module.module.").encode()))
        whole = 0.3 * torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        parameter.copy_(whole)


def released(case: cases.Case) -> list[Tensor]:
    """The gradients that AdamW was given, whole, in the order of the parameters."""
    found: list[Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if type(optimizer) is torch.optim.AdamW:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            found[:] = [g.full_tensor() if isinstance(g, DTensor) else g.clone() for g in gradients]

    handle = register_optimizer_step_post_hook(keep)
    step, end = sides.build(case, CPU)
    step()
    end()
    handle.remove()
    return found


def gradients_of_sides(rank: int, world_size: int, pairs: list[tuple[str, str, bool]]) -> list[tuple[float, ...]]:
    """For each (model, side, tied): the norms of the difference from ours, and of ours."""
    sides.DTYPE, sides.NOISE_MULTIPLIER = torch.float32, 0.0
    sides.initialize = peers.initialize = named_weights
    answers = []
    for model, side, tied in pairs:
        (ours, theirs) = cases.parse(f"{model}:flat,{side}", microbatches=2, checkpointing=False)
        shape = replace(ours.shape, tied=tied)
        mine, other = (released(replace(case, shape=shape)) for case in (ours, theirs))
        assert len(mine) == len(other) > 0
        off = sum(float((a - b).norm() ** 2) for a, b in zip(mine, other, strict=True)) ** 0.5
        answers.append((off, sum(float(g.norm() ** 2) for g in mine) ** 0.5))
    return answers


PAIRS = [
    ("gpt2-tiny", "opacus", False),
    ("gpt2-tiny", "opacus-hooks", True),
    ("roberta-tiny", "opacus", False),
    ("roberta-tiny", "opacus-hooks", False),
    ("llama-tiny", "opacus", False),
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Opacus' own, of torch's hooks
def test_opacus_gradient_is_ours() -> None:
    for answers in run(gradients_of_sides, 2, PAIRS):
        for pair, (off, norm) in zip(PAIRS, answers, strict=True):
            assert norm > 0.1 and off / norm < 1e-3, (pair, off, norm)
