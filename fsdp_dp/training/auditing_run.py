"""The run that is audited: training as `fsdp_dp.train` does it, with canaries among the rows, and their scores.

Before it, an engine without noise is tried on the sharded model: rows alone, which must come out within R, and numbers
so far apart that a narrow format would lose one of them on the way between ranks.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fsdp_dp.auditing import Audit, lower_bound, reach
from fsdp_dp.config import PrivacyConfig
from fsdp_dp.data.corpus import load_corpus
from fsdp_dp.data.packing import RowDataset, split_row
from fsdp_dp.engine import PrivacyEngine, make_private
from fsdp_dp.errors import PrivacyError
from fsdp_dp.models.build import vocabulary_size
from fsdp_dp.models.objective import row_losses
from fsdp_dp.training.app import privacy_config
from fsdp_dp.training.audit_options import AuditConfig
from fsdp_dp.training.building import build_engine, build_model, build_optimizer
from fsdp_dp.training.canaries import CanaryRows, WithCanaries
from fsdp_dp.training.loop import set_learning_rate
from fsdp_dp.training.run_folder import check_folder
from fsdp_dp.training.schedule import learning_rate
from fsdp_dp.training.world import World, check_device

TABLE = "canary.weight"
ROWS_ALONE = 4
_STEEP = 1e4  # times the loss, so that every row is clipped
_FAINT = 2.0**-12  # of the first rank's gradient, on the others: bfloat16 keeps 8 bits


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be run, checked against its data; `rows` are the ordinary ones."""

    config: AuditConfig
    privacy: PrivacyConfig
    rows: Tensor


def prepare(config: AuditConfig) -> Job:
    """Read the data and settle the mechanism, before any process group.

    Raises:
        ValueError: a GPU or the data is missing, the folder holds a run, or the mechanism does not fit.
    """
    check_device(config.device)
    check_folder(config)
    train = load_corpus(config.data, config.model).train
    assert isinstance(train, RowDataset)
    rows = train.rows[: config.audit.rows]
    privacy = privacy_config(config, config.audit.canaries + len(rows))
    assert privacy is not None
    return Job(config=config, privacy=privacy, rows=rows)


def audit(job: Job, world: World) -> Audit:
    """Train with canaries and compare what is found with what is claimed. Every rank calls it, and gets the same."""
    options = job.config.audit
    dataset = insert_canaries(job, world)
    model = build_model(
        job.config,
        world,
        lambda decoder: WithCanaries(decoder, options.canaries, options.norm * job.privacy.max_grad_norm),
    )
    longest = try_without_noise(job, world, model, dataset)
    optimizer = build_optimizer(model, job.config.optimizer, job.config.sharding.strategy)
    engine = build_engine(model, optimizer, job.privacy)
    assert engine is not None
    canaries = dataset.rows[: options.canaries]
    before = canary_losses(model, canaries, job.config, world) if options.kind == "data" else None
    scores = train(job, world, dataset, model, optimizer, engine)
    if before is not None:
        scores = before - canary_losses(model, canaries, job.config, world)
    delta = job.privacy.target_delta if options.delta is None else options.delta
    coins = dataset.included.tolist()
    return Audit(
        found=lower_bound(scores.tolist(), coins, delta=delta, confidence=options.confidence),
        claimed=engine.epsilon(delta),
        reach=reach(coins, delta=delta, confidence=options.confidence),
        mechanism=describe(job, world, engine, dataset, longest),
    )


def try_without_noise(job: Job, world: World, model: nn.Module, dataset: CanaryRows) -> float:
    """The longest contribution of a few rows, each alone, in units of R.

    Raises:
        PrivacyError: one was longer than R, or ranks' gradients were added up in a narrow format.
    """
    privacy = replace(
        job.privacy,
        sampling="external_poisson",
        noise_multiplier=0.0,
        target_epsilon=None,
        seed=None,
        max_batch_size=None,
        adaptive_bounds=None,
    )
    engine = make_private(model, privacy)
    nobody, somebody = torch.tensor([0], device=world.device), torch.tensor([1], device=world.device)
    longest = 0.0
    for row in dataset.rows[:ROWS_ALONE]:
        inputs, targets = (x.to(world.device) for x in split_row(row[None]))
        with engine.microbatch(torch.tensor([engine.model.data_rank == 0])):
            logits, _ = model(inputs, nobody)
            (_STEEP * row_losses(logits, targets).sum()).backward()
        longest = max(longest, engine.guard.check_sum(engine.max_grad_norm) / engine.max_grad_norm)
        engine.discard()
    first = engine.model.data_rank == 0
    with engine.microbatch(torch.tensor([True])):
        _, canary_losses_B = model(inputs, somebody)
        (canary_losses_B.sum() / (4 * job.config.audit.norm) * (1.0 if first else _FAINT)).backward()
    found = engine.guard.check_sum(engine.max_grad_norm) / engine.max_grad_norm
    expected = (1 + (engine.model.data_size - 1) * _FAINT) / 4
    engine.detach()
    # Elsewhere R / 4 may itself be clipped, or rounded by the forward.
    exact = (job.privacy.clipping, job.privacy.clip_function) == ("flat", "abadi")
    if exact and job.config.precision.compute == "fp32" and abs(found / expected - 1) > _FAINT / 16:
        raise PrivacyError(f"Gradients of ranks added up to {found:.6g} R, expected {expected:.6g} R: a narrow format?")
    return longest


def insert_canaries(job: Job, world: World) -> CanaryRows:
    """The rows of the run: canaries of random bytes, in or out by rank 0's coins, then the ordinary rows."""
    options = job.config.audit
    seed = (
        options.seed if options.seed is not None else world.from_main(secrets.randbits(63) if world.is_main else None)
    )
    generator = torch.Generator().manual_seed(seed)
    included = torch.rand(options.canaries, generator=generator) < 0.5
    shape = (options.canaries, job.rows.shape[1])
    canaries = torch.randint(min(vocabulary_size(job.config.model), 255), shape, generator=generator, dtype=torch.uint8)
    return CanaryRows(torch.cat([canaries, job.rows]), included, gradient=options.kind == "gradient")


def train(
    job: Job,
    world: World,
    dataset: CanaryRows,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    engine: PrivacyEngine,
) -> Tensor:
    """All steps of the run; what the releases held in the directions of the canaries, added up."""
    config, scores = job.config, torch.zeros(job.config.audit.canaries, dtype=torch.float64)
    for step, batch in enumerate(engine.loader(dataset, config.microbatch_size), start=1):
        set_learning_rate(optimizer, learning_rate(config.optimizer, step, config.steps))
        for inputs, targets, marker in batch:
            logits, canary_losses_B = model(inputs.to(world.device), marker.to(world.device))
            losses_B = row_losses(logits, targets.to(world.device)) + canary_losses_B
            (losses_B.sum() / config.microbatch_size).backward()
        engine.privatize()
        scores += released_table(engine)[1:]
        optimizer.step()
        optimizer.zero_grad()
    return scores


def released_table(engine: PrivacyEngine) -> Tensor:
    """The private gradient of the whole table of canaries, from the ranks that hold parts of it."""
    (table,) = (p for p in engine.model.parameters if p.name.endswith(TABLE))
    grad, region = table.parameter.grad, table.region
    whole = torch.zeros(2, table.numel, dtype=torch.float64, device=engine.model.device)
    if grad is not None and region.count:
        part = slice(region.start, region.start + region.count)
        whole[0, part] = (grad.to_local() if isinstance(grad, DTensor) else grad).flatten().double()
        whole[1, part] = 1
    for group in engine.model.groups:
        dist.all_reduce(whole, group=group)
    return (whole[0] / whole[1]).cpu()


@torch.no_grad()
def canary_losses(model: nn.Module, rows: Tensor, config: AuditConfig, world: World) -> Tensor:
    """The loss of each canary, whether it takes part or not; every rank computes all."""
    was_training = model.training
    model.eval()
    losses = []
    for part in rows.split(config.microbatch_size):
        inputs, targets = (x.to(world.device) for x in split_row(part))
        logits, _ = model(inputs, torch.zeros(len(part), dtype=torch.long, device=world.device))
        losses.append(row_losses(logits, targets).double().cpu())
    model.train(was_training)
    return torch.cat(losses)


def describe(job: Job, world: World, engine: PrivacyEngine, dataset: CanaryRows, longest: float) -> dict[str, object]:
    options = job.config.audit
    return {
        "canaries": f"{options.canaries} {options.kind}, {int(dataset.included.sum())} take part, of {len(dataset)} rows",
        "releases": engine.steps,
        "noise_multiplier": f"{engine.noise_multiplier:.6g}",
        "sampling": f"{job.privacy.sampling}, rate {job.privacy.sample_rate:.4g}",
        "rows_alone": f"{longest:.4g} of max_grad_norm at most",
        "sharding": f"{job.config.sharding.strategy}, {world.size} ranks",
    }
