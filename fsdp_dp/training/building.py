"""From the configuration to a sharded model, its optimizer and its privacy engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fsdp_dp.config import PrivacyConfig
from fsdp_dp.engine import PrivacyEngine, make_private
from fsdp_dp.models import llama
from fsdp_dp.models.build import build
from fsdp_dp.training.schema import REPLICATED, OptimizerConfig, TrainConfig
from fsdp_dp.training.world import World

FSDP1_STRATEGIES = {
    "full_shard": ShardingStrategy.FULL_SHARD,
    "shard_grad_op": ShardingStrategy.SHARD_GRAD_OP,
    "no_shard": ShardingStrategy.NO_SHARD,
    "hybrid_shard": ShardingStrategy.HYBRID_SHARD,
    "hybrid_shard_zero2": ShardingStrategy._HYBRID_SHARD_ZERO2,
}

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def build_model(
    config: TrainConfig, world: World, around: Callable[[nn.Module], nn.Module] = lambda model: model
) -> nn.Module:
    """The model on `world.device`, sharded block by block; every rank starts from the same weights.

    What `around` makes of the model is sharded in its place; it has the model's `blocks`.

    One process alone gets FSDP2 where FSDP1 was asked for: with nothing to split, FSDP1 falls back to a deprecated mode.
    """
    torch.manual_seed(config.seed)
    model = around(build(config.model))
    # Dropout: other rows, other masks; tensor-parallel peers hold the same rows and need the same masks.
    torch.manual_seed(config.seed + world.data_rank)
    if config.sharding.strategy in FSDP1_STRATEGIES and world.data_size > 1:
        return shard_fsdp1(model, config, world)
    if config.sharding.strategy in REPLICATED:
        return DistributedDataParallel(model.to(world.device), process_group=world.data_mesh.get_group())
    if world.tensor_mesh is not None:
        split_linears(model, world)
    return shard_fsdp2(model, config, world)


def shard_fsdp1(model: nn.Module, config: TrainConfig, world: World) -> nn.Module:
    """FSDP1, one unit a block and one for the rest."""
    precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallel(
        model,
        device_mesh=world.data_mesh,
        sharding_strategy=FSDP1_STRATEGIES[config.sharding.strategy],
        auto_wrap_policy=ModuleWrapPolicy({type(block) for block in model.blocks}),  # type: ignore[union-attr]
        mixed_precision=precision if config.precision.compute == "bf16" else None,
        device_id=world.device,
        use_orig_params=True,
    )


def shard_fsdp2(model: nn.Module, config: TrainConfig, world: World) -> nn.Module:
    """FSDP2, one unit a block and one for the rest; over the data dimension where there is a tensor one as well."""
    policy = MixedPrecisionPolicy()
    if config.precision.compute == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model.to(world.device)
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=world.data_mesh, mp_policy=policy)
    fully_shard(model, mesh=world.data_mesh, mp_policy=policy)
    return model


def split_linears(model: nn.Module, world: World) -> None:
    """Tensor parallelism: each rank holds some heads and some hidden features, and the outputs are summed."""
    assert world.tensor_mesh is not None
    model.to(world.device)
    for block in model.blocks:  # type: ignore[union-attr]
        plan = {
            "attention.query": ColwiseParallel(),
            "attention.key": ColwiseParallel(),
            "attention.value": ColwiseParallel(),
            "attention.output": RowwiseParallel(),
            "mlp.up": ColwiseParallel(),
            "mlp.down": RowwiseParallel(),
        }
        if isinstance(block, llama.Block):
            plan["mlp.gate"] = ColwiseParallel()
        parallelize_module(block, world.tensor_mesh, plan)


def build_optimizer(model: nn.Module, config: OptimizerConfig, strategy: str = "full_shard") -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters, as sharded; its learning rate is set at every step."""
    parameters, kind = [p for p in model.parameters() if p.requires_grad], OPTIMIZERS[config.name]
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.name == "sgd":
        options["momentum"] = config.momentum
    else:
        options["betas"] = (config.beta1, config.beta2)
    if strategy == "zero1":
        from fsdp_dp.training.zero1 import Zero1

        return Zero1(parameters, optimizer_class=kind, **options)
    return kind(parameters, **options)


def build_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, privacy: PrivacyConfig | None
) -> PrivacyEngine | None:
    """The engine that makes the model's gradients private; None for plain training."""
    return None if privacy is None else make_private(model, privacy, optimizer)
