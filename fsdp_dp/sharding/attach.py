"""Which of the sharding backends fits a model."""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fsdp_dp.sharding.base import ShardedModel
from fsdp_dp.sharding.fsdp1 import Fsdp1Model
from fsdp_dp.sharding.fsdp2 import Fsdp2Model
from fsdp_dp.sharding.tensor_parallel import TensorParallelModel
from fsdp_dp.sharding.whole import DdpModel, WholeModel


def open_model(root: nn.Module, *, alone: bool = False) -> ShardedModel:
    """The backend of ``root``; raises ValueError, with what to do, for a way of sharding that is not supported.

    ``alone``: of a model that is examined and not trained, other processes need not hold a part.
    """
    _check_materialized(root)
    model = _backend(root)
    if not alone:
        _check_every_process_takes_part(model)
    return model


def _check_materialized(root: nn.Module) -> None:
    name = next((name for name, p in root.named_parameters() if p.requires_grad and p.is_meta), None)
    if name is not None:
        raise ValueError(
            f"make_private: parameter '{name}' is still on the meta device; make the model real first (to_empty and "
            "initialize, after fully_shard)"
        )


def _check_every_process_takes_part(model: ShardedModel) -> None:
    """Rows that other processes draw would be missing from the sums, and their models would drift apart."""
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    taking_part = math.prod(dist.get_world_size(group) for group in model.groups)
    if taking_part != processes:
        raise ValueError(
            f"make_private: the model ({model.kind}) spans {taking_part} of {processes} processes, so the rows of the "
            "others would be missing from its sums; shard the model over all of them before make_private "
            "(FullyShardedDataParallel or fully_shard, without a smaller process_group or mesh), or start one process"
        )


def _backend(root: nn.Module) -> ShardedModel:
    modules = list(root.modules())
    if isinstance(root, DistributedDataParallel):
        return DdpModel(root)
    if any(isinstance(m, DistributedDataParallel) for m in modules):
        raise ValueError(
            "make_private: a submodule is wrapped with DistributedDataParallel, but the model itself is not; wrap the root"
        )
    if isinstance(root, FullyShardedDataParallel):
        return Fsdp1Model(root)
    if any(isinstance(m, FullyShardedDataParallel) for m in modules):
        raise ValueError(
            "make_private: submodules are wrapped with FullyShardedDataParallel, but the model itself is not; "
            "wrap the root as well"
        )
    if any(isinstance(m, FSDPModule) for m in modules):
        return Fsdp2Model(root)
    if any(isinstance(p, DTensor) for p in root.parameters()):
        return TensorParallelModel(root)
    return WholeModel(root)
