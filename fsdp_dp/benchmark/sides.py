"""A step of each side: the same model, data, precision (bf16, sums in fp32) and AdamW; every microbatch is reduced."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from fsdp_dp.benchmark import meshes, peers
from fsdp_dp.benchmark.cases import Case
from fsdp_dp.benchmark.feeding import DATASET_SIZE, Feed
from fsdp_dp.benchmark.models import Block, Transformer, initialize
from fsdp_dp.config import PrivacyConfig
from fsdp_dp.engine import make_private

Step = Callable[[], None]
NOISE_MULTIPLIER, MAX_GRAD_NORM = 1.0, 1.0
DTYPE = torch.bfloat16
COMPILER = "inductor"
PEERS = {"opacus": peers.ghost, "opacus-hooks": peers.hooks}


def build(
    case: Case, device: torch.device, feed: Feed | None = None
) -> tuple[Step, Callable[[], None], Callable[[], str]]:
    """One logical batch of this side, what ends it, and how its replicas compare (see `meshes.replicas`)."""
    mesh = meshes.mesh_of(case.sharding, device.type)
    feed = feed or Feed(case, device, meshes.data_rank(mesh))
    torch.manual_seed(0)  # copies start from the same weights, and so do all sides
    if case.side in PEERS:
        data = list(next(feed.batches(None)))
        return PEERS[case.side](case, data, device, _mechanism(case)), lambda: None, lambda: "none"
    model = _sharded(case, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine = None if case.side.startswith("plain") else make_private(model, _privacy(case), optimizer)
    end: Callable[[], None] = engine.detach if engine is not None else lambda: None
    batches = feed.batches(engine)

    def step() -> None:
        for inputs, targets in next(batches):
            model(inputs, targets).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, end, functools.partial(meshes.replicas, model, mesh)


def _privacy(case: Case) -> PrivacyConfig:
    clipping: Any = case.side.removesuffix("-fsdp1")
    return PrivacyConfig(
        max_grad_norm=MAX_GRAD_NORM,
        noise_multiplier=NOISE_MULTIPLIER,
        expected_batch_size=_rows_of_a_step(case),
        dataset_size=DATASET_SIZE,
        target_delta=1e-8,
        sampling="poisson" if case.loader else "external_poisson",
        clipping=clipping,
    )


def _mechanism(case: Case) -> peers.Mechanism:
    return peers.Mechanism(
        max_grad_norm=MAX_GRAD_NORM,
        noise_multiplier=NOISE_MULTIPLIER,
        expected_batch_size=_rows_of_a_step(case),
        dtype=DTYPE,
    )


def _rows_of_a_step(case: Case) -> int:
    return case.shape.rows * case.microbatches * case.sharding.data_ranks


def _sharded(case: Case, device: torch.device) -> nn.Module:
    """One unit a block, one for the rest; weights are made after sharding, so that no GPU holds the whole model."""
    tied = case.shape.tied
    if case.backend == "FSDP1":
        model = Transformer(case.shape, tied=tied, checkpointing=case.checkpointing).to(device)
        initialize(model)
        _compile(model, case)
        precision = MixedPrecision(param_dtype=DTYPE, reduce_dtype=torch.float32)
        return FullyShardedDataParallel(
            model, auto_wrap_policy=ModuleWrapPolicy({Block}), mixed_precision=precision, device_id=device,
            use_orig_params=True,
        )  # fmt: skip
    with torch.device("meta"):
        model = Transformer(case.shape, tied=tied, checkpointing=case.checkpointing)
    policy = MixedPrecisionPolicy(param_dtype=DTYPE, reduce_dtype=torch.float32)
    mesh = meshes.mesh_of(case.sharding, device.type)
    if case.sharding.tensor > 1:
        meshes.split_linears(model.blocks, mesh["tensor"])
    _compile(model, case)
    for block in model.blocks:
        fully_shard(block, mesh=meshes.data_mesh(mesh), mp_policy=policy)
    fully_shard(model, mesh=meshes.data_mesh(mesh), mp_policy=policy)
    model.to_empty(device=device)
    initialize(model)
    return model


def _compile(model: Transformer, case: Case) -> None:
    """Block by block, as every trainer does; not the embedding and the head."""
    if case.compiled:
        for block in model.blocks:
            block.compile(backend=COMPILER)
