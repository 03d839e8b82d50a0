"""One step of a run, traced: forward, backward and optimizer of the program itself, with its memory and collectives."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from fsdp_dp.config import PrivacyConfig
from fsdp_dp.engine import PrivacyEngine, make_private
from fsdp_dp.models.build import build as build_model
from fsdp_dp.models.objective import row_losses
from fsdp_dp.planning.fakes import (
    drop_given_away,
    fake_ranks,
    fake_reducer,
    fake_values,
    past_first_step,
    records_of,
    sums_of,
)
from fsdp_dp.planning.options import decoder
from fsdp_dp.planning.tracker import (
    ACTIVATIONS,
    GRADIENTS,
    PARAMETERS,
    RECORDS,
    SCRATCH,
    STATE,
    SUMS,
    UNITS,
    MemoryTracker,
    Segment,
    local,
)
from fsdp_dp.training.building import build_optimizer, shard_fsdp2, split_linears
from fsdp_dp.training.schema import REPLICATED, TrainConfig
from fsdp_dp.training.world import World, describe_world

EDGE = 2
"""Blocks at each end of the model whose segments are told apart; those between lie between."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """What one rank holds and sends in a step of one microbatch.

    Attributes:
        peaks: of each segment of the step, bytes by kind.
        calls, sent: collectives of a microbatch, and their bytes, by kind.
        sent_by_optimizer: bytes of the optimizer's own, once a step.
    """

    peaks: dict[Segment, Counter[str]]
    calls: Counter[str]
    sent: Counter[str]
    sent_by_optimizer: Counter[str]

    @property
    def peak(self) -> Counter[str]:
        """The largest of all segments, by kind."""
        return max(self.peaks.values(), key=Counter.total)

    @property
    def peak_segment(self) -> Segment:
        return max(self.peaks, key=lambda segment: self.peaks[segment].total())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What is traced: a configuration on so many ranks, plain or clipped in some groups.

    A subclass may trace another decoder than the application's, of the shape that the configuration says.
    """

    config: TrainConfig
    world_size: int
    side: str
    microbatch_size: int
    accumulates: bool = False
    """A step has several microbatches, so that gradients are held in forward."""
    activation_checkpointing: bool = False
    fused: bool = False
    """The optimizer updates in one kernel, without the copies that torch's default (``foreach``) makes on a GPU."""

    @property
    def on_gpu(self) -> bool:
        return self.config.device != "cpu"

    def with_layers(self, layers: int) -> Step:
        model = dataclasses.replace(decoder(self.config), layers=layers)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, model=model))

    def make_model(self) -> nn.Module:
        return build_model(self.config.model)

    def split(self, model: nn.Module, world: World) -> None:
        """Over the ranks of a tensor-parallel mesh."""
        split_linears(model, world)

    def losses(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Of the rows, [B]."""
        return row_losses(model(tokens), tokens)


def trace(step: Step) -> Trace:
    """Run a step on fake tensors, as rank 0 of fake ranks."""
    with fake_ranks(step.world_size) as store, fake_values(step.on_gpu):
        world = describe_world(step.config, torch.device("cpu"), store)
        model = build(step, dataclasses.replace(world, device=torch.device("meta")))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            shape = (step.microbatch_size, decoder(step.config).block_size)
            return run_step(step, model, torch.empty(shape, dtype=torch.int64), world)


def build(step: Step, world: World) -> nn.Module:
    """The model as the application shards it; what it does with FSDP1 is planned with FSDP2, which holds the same."""
    strategy = step.config.sharding.strategy
    with world.device:
        model = step.make_model()
    if step.activation_checkpointing:
        blocks = model.get_submodule("blocks")
        assert isinstance(blocks, nn.ModuleList)
        for i, block in enumerate(blocks):
            blocks[i] = checkpoint_wrapper(block, preserve_rng_state=False)
    if strategy in REPLICATED:
        return model
    if world.tensor_mesh is not None:
        step.split(model, world)
    sharded = shard_fsdp2(model, step.config, world)
    if strategy in ("shard_grad_op", "hybrid_shard_zero2"):
        for module in sharded.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False)
    return sharded


def replicate(step: Step, model: nn.Module, world: World, *, init_sync: bool = True) -> nn.Module:
    """A model that is no longer on the meta device in DDP, where the strategy is one of DDP's; any other as it is."""
    if step.config.sharding.strategy not in REPLICATED:
        return model
    return DistributedDataParallel(model, process_group=world.data_mesh.get_group(), init_sync=init_sync)


def run_step(step: Step, model: nn.Module, tokens: Tensor, world: World) -> Trace:
    """Trace one microbatch and the optimizer's step, after a microbatch (or a step) that has made what is kept."""
    strategy = step.config.sharding.strategy
    optimizer = build_optimizer(model, step.config.optimizer, strategy)
    for group in optimizer.param_groups:
        group["foreach"], group["fused"] = step.on_gpu and not step.fused, step.fused
    tracker = MemoryTracker()
    tracker.count([*model.parameters(), *model.buffers()], PARAMETERS)
    with tracker:
        tracker.move("wrap", 0, UNITS)
        model = replicate(step, model, world, init_sync=False)
        fake_reducer(model)
        private = attach(step, model, optimizer, tracker)

        def released(*_: Any) -> None:
            """After the engine's own hook."""
            tracker.count(gradients(model), GRADIENTS)
            tracker.move("optimizer", 0, SCRATCH)

        optimizer.register_step_pre_hook(released)
        with segments(model, private, tracker):
            for _ in range(1 if private is None else 2):  # until both buckets have had the largest unit
                run_microbatch(step, model, tokens, tracker)
            if not step.accumulates:
                run_optimizer(optimizer, tracker)
                drop_given_away(private)
            tracker.count(state_of(optimizer), STATE)
            tracker.forget()
            run_microbatch(step, model, tokens, tracker)
        calls, sent = Counter(tracker.calls), Counter(tracker.sent)
        run_optimizer(optimizer, tracker)
        sent_by_optimizer = tracker.sent - sent
    missing = sum(local(x).nbytes for x in state_of(optimizer)) if step.accumulates else 0
    return Trace(peaks=with_state(tracker.peaks, missing), calls=calls, sent=sent, sent_by_optimizer=sent_by_optimizer)


def run_microbatch(step: Step, model: nn.Module, tokens: Tensor, tracker: MemoryTracker) -> None:
    tracker.move("forward", 0, ACTIVATIONS)
    loss = step.losses(model, tokens).mean()
    tracker.move("loss", 0, SCRATCH)
    loss.backward()
    tracker.move("after backward")


def run_optimizer(optimizer: torch.optim.Optimizer, tracker: MemoryTracker) -> None:
    tracker.move("release", 0, SCRATCH)
    optimizer.step()
    optimizer.zero_grad()


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [x for kept in optimizer.state.values() for x in kept.values() if isinstance(x, Tensor)]


def with_state(peaks: dict[Segment, Counter[str]], nbytes: int) -> dict[Segment, Counter[str]]:
    """Peaks of a later step, if the optimizer has made so much state in this one: it is there from the start."""
    made = {segment: SCRATCH for segment in peaks if segment[0] == "optimizer"}
    return {
        segment: peak + Counter({STATE: nbytes}) - Counter({made[segment]: nbytes} if segment in made else {})
        for segment, peak in peaks.items()
    }


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def attach(
    step: Step, model: nn.Module, optimizer: torch.optim.Optimizer, tracker: MemoryTracker
) -> PrivacyEngine | None:
    """The engine of a private side; its numbers do not matter here, its groups do."""
    if step.side == "plain":
        return None
    privacy = PrivacyConfig(
        max_grad_norm=step.config.privacy.max_grad_norm,
        noise_multiplier=1.0,
        expected_batch_size=step.config.batch_size,
        dataset_size=100 * step.config.batch_size,
        target_delta=1e-4 / step.config.batch_size,
        sampling="external_poisson",
        clipping=step.side,  # type: ignore[arg-type]
        clip_function=step.config.clipping.clip_function,  # type: ignore[arg-type]
    )
    tracker.move("attach", 0, SUMS)
    private = make_private(model, privacy, optimizer)
    past_first_step(private)
    return private


@contextmanager
def segments(model: nn.Module, private: PrivacyEngine | None, tracker: MemoryTracker) -> Iterator[None]:
    """Tell the tracker where the step is: which block runs forward or backward, which unit's gradients are summed."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    blocks, handles = list(bare.blocks), []  # type: ignore[arg-type]

    def move(phase: str, place: int, kind: str) -> None:
        if private is not None:
            tracker.count(records_of(private), RECORDS, instead_of=(ACTIVATIONS, SCRATCH))
            tracker.count(sums_of(private), SUMS)
        else:
            tracker.count(gradients(model), GRADIENTS)
        tracker.move(phase, place, kind)

    for i, block in enumerate(blocks):
        place = from_the_nearer_end(i, len(blocks))

        def before(module: nn.Module, args: Any, place: int = place) -> None:
            move("forward", place, ACTIVATIONS)

        def after(module: nn.Module, args: Any, output: Tensor, place: int = place) -> None:
            output.register_hook(lambda grad: move("backward", place, SCRATCH))

        handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    if private is not None:
        private.model.start_accumulate = _announced(private, move)  # type: ignore[method-assign]
    yield
    for handle in handles:
        handle.remove()


def _announced(private: PrivacyEngine, move: Callable[[str, int, str], None]) -> Callable[..., None]:
    start_accumulate, units = private.model.start_accumulate, private.model.unit_count

    def announce(unit: int, gradients: Any, standing: Any = None) -> None:
        move("sum", from_the_nearer_end(unit, units), SCRATCH)
        start_accumulate(unit, gradients, standing)

    return announce


def from_the_nearer_end(index: int, count: int) -> int:
    """``index`` if it is near the start, else its distance from the end, negative: the same place at any depth."""
    return index if index < EDGE else index - count
