"""Fake ranks, and the few places of the engine where a fake tensor cannot pass, or would not do what a GPU does.

Within `fake_ranks` a process is rank 0 of as many as one likes: torch's `fake` process group completes every collective at
once. Within `fake_values` the engine runs on tensors without values: what ranks agree on is what rank 0 says, checks of
values have passed, noise is drawn in place by a kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from fsdp_dp import engine, gradients, numerics
from fsdp_dp.engine import PrivacyEngine
from fsdp_dp.sharding import ShardedModel
from fsdp_dp.watch import buffer_versions


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """This process as rank 0 of ``world_size``."""
    if dist.is_initialized():
        raise RuntimeError("planning: a process group is initialized; plan in a process of its own, without torchrun")
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_values(on_gpu: bool) -> Iterator[None]:
    """The engine on tensors without values; with ``on_gpu``, it takes the ways that it takes on one."""
    replaced: list[tuple[Any, str, Any]] = [
        (ShardedModel, "agree", lambda self, payload: payload),
        (ShardedModel, "any_rank", lambda self, flag: flag),
        (PrivacyEngine, "_has_equal_rows", lambda self, inputs: True),
        (engine, "privatize_all_", lambda segments, **_: None),
    ]
    if on_gpu:
        replaced += [(module, "on_tensor_cores", _all_bfloat16) for module in (numerics, gradients)]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        yield


def past_first_step(private: PrivacyEngine) -> None:
    """As after the first step, whose checks look at values: the model and the loss have been found to be good."""
    private._checked = True
    private._watched.add(tuple(module.training for module in private.model.root.modules()))
    private._buffer_versions = buffer_versions(private.model.root)


def records_of(private: PrivacyEngine) -> Iterable[Tensor]:
    """The tensors in which the rows' gradients are kept at this moment."""
    microbatch = private._current
    held = microbatch.sums.held if microbatch is not None and microbatch.sums is not None else []
    return (x for gradient in held for x in vars(gradient).values() if isinstance(x, Tensor))


def _all_bfloat16(*factors: Tensor) -> bool:
    return all(x.dtype == torch.bfloat16 for x in factors)
