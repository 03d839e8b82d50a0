"""Models sharded as their users shard them: a unit for every block of a list of blocks, and the root."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from fsdp_dp import FullyShardedDataParallel, PrivacyConfig, PrivacyEngine, make_private
from tests.agreement import Attach, private_update
from tests.distributed.backends import whole_parameters
from tests.models.adapters import ADAPTED
from tests.models.variants import VARIANTS
from tests.models.zoo import MODELS
from tests.oracle import Gradients

CPU = torch.device("cpu")


def blocks(model: nn.Module) -> set[type[nn.Module]]:
    """The classes that become units of their own: what is repeated. (Hugging Face's `_no_split_modules` also name embeddings,
    which FSDP cannot separate from a head that is tied to them.)
    """
    return {type(block) for module in model.modules() if isinstance(module, nn.ModuleList) for block in module}


def fsdp1(model: nn.Module, privacy: PrivacyConfig) -> tuple[nn.Module, PrivacyEngine]:
    policy = ModuleWrapPolicy(blocks(model))
    options: dict[str, Any] = {"auto_wrap_policy": policy, "device_id": CPU}
    wrapped = FullyShardedDataParallel(model, privacy=privacy, **options)
    assert wrapped.privacy_engine is not None
    return wrapped, wrapped.privacy_engine


def fsdp2(model: nn.Module, privacy: PrivacyConfig) -> tuple[nn.Module, PrivacyEngine]:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    kinds = blocks(model)
    for module in reversed([module for module in model.modules() if type(module) in kinds]):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, make_private(model, privacy)


SHARDINGS: dict[str, Attach] = {"FSDP1": fsdp1, "FSDP2": fsdp2}
SUBJECTS = MODELS | VARIANTS | ADAPTED


@dataclass(frozen=True, kw_only=True)
class Update:
    """One private update of a model on all ranks, as its optimizer saw it; the last rank has no rows if so asked."""

    model: str
    sharding: str
    bound: float
    empty_last: bool = False

    def run(self) -> Gradients:
        options: dict[str, Any] = {"attach": SHARDINGS[self.sharding], "parameters": whole_parameters}
        return private_update(SUBJECTS[self.model], self.bound, **options, empty_last=self.empty_last)
