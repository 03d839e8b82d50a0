"""Attaches models to each sharding backend through the public interface, trains them, gathers what became of them.

A `Task` runs on every rank and answers on rank 0; the test process compares that with the oracle's loop, which it runs
once for all world sizes and backends.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecision, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as TorchFSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fsdp_dp import FullyShardedDataParallel, PrivacyConfig, PrivacyEngine, make_private
from tests.distributed.harness import run
from tests.oracle import (
    CASES,
    OPTIMIZERS,
    PRECISION_ROWS,
    Block,
    Gradients,
    Groups,
    Unit,
    bare_name,
    clipped_sum,
    is_listed,
    is_unit,
    median_norm,
    norm,
    relative_error,
    row_gradients,
    rows_of_step,
    share,
    trained,
)

CPU = torch.device("cpu")
EXPECTED_BATCH_SIZE = 8  # a power of two: multiplying by it is exact
TOLERANCE = 1e-10
FLAT = Groups()

# ------------------------------------------------------------------------------------------------------------ sharding

Sharding = Callable[[nn.Module], nn.Module]


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """What torch itself says while it shards on one CPU host, and nothing else."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP is switching to use `NO_SHARD`", UserWarning)
        warnings.filterwarnings("ignore", "The `NO_SHARD` sharding strategy is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w+\) returned a view tensor", UserWarning)
        warnings.filterwarnings("ignore", ".* has both parameters with requires_grad=True and False", UserWarning)
        yield


def two_by(ranks: int) -> DeviceMesh:
    """Two replicas (or one, on one rank) of so many shards: a (replicate, shard) mesh of all ranks."""
    return init_device_mesh("cpu", (max(1, ranks // 2), min(2, ranks)), mesh_dim_names=("replicate", "shard"))


def fsdp1_arguments(strategy: str = "FULL_SHARD", units: bool = True, bf16: bool = False) -> dict[str, Any]:
    """Constructor arguments of FSDP1 on CPU."""
    mesh = {"device_mesh": two_by(dist.get_world_size())} if "HYBRID" in strategy else {}
    precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else None
    return {
        "sharding_strategy": ShardingStrategy[strategy],
        "auto_wrap_policy": ModuleWrapPolicy({Unit}) if units else None,
        "mixed_precision": precision,
        "device_id": CPU,
        "use_orig_params": True,
        **mesh,
    }


def fsdp2(model: nn.Module, *, units: bool = True, bf16: bool = False, mesh: Any = None) -> nn.Module:
    """`fully_shard` on every unit, then on the root."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    for module in model.modules():
        if units and isinstance(module, Unit) and module is not model:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def fsdp2_hybrid(model: nn.Module, **options: Any) -> nn.Module:
    return fsdp2(model, mesh=two_by(dist.get_world_size()), **options)


def tensor_parallel_plan(local_outputs: bool) -> dict[str, ParallelStyle]:
    """Attention by head, the MLP by hidden unit.

    Activations between fc1 and fc2 are plain tensors, or DTensors: torch refuses plain ones of uneven sizes.
    """
    return {
        **{f"attention.{name}": ColwiseParallel() for name in "qkv"},
        "attention.o": RowwiseParallel(),
        "fc1": ColwiseParallel(use_local_output=local_outputs),
        "fc2": RowwiseParallel(),
    }


def tensor_parallel(model: nn.Module, *, data_size: int, local_outputs: bool = False, head: bool = False) -> nn.Module:
    """Blocks (and the output head, where asked) over tensor ranks, all else replicated; then `fully_shard`."""
    mesh = init_device_mesh("cpu", (data_size, dist.get_world_size() // data_size), mesh_dim_names=("data", "tensor"))
    for module in model.modules():
        if isinstance(module, Block):
            parallelize_module(module, mesh["tensor"], tensor_parallel_plan(local_outputs))
    if head:
        parallelize_module(model, mesh["tensor"], {"head": ColwiseParallel(output_layouts=Replicate())})
    return fsdp2(model, mesh=mesh["data"])


def private_fsdp1(model: nn.Module, privacy: PrivacyConfig, **arguments: Any) -> tuple[nn.Module, PrivacyEngine]:
    """The drop-in class."""
    with quiet_torch():
        wrapped = FullyShardedDataParallel(model, privacy=privacy, **fsdp1_arguments(**arguments))
    assert wrapped.privacy_engine is not None
    return wrapped, wrapped.privacy_engine


def private_torch_fsdp1(model: nn.Module, privacy: PrivacyConfig) -> tuple[nn.Module, PrivacyEngine]:
    """torch's own class, and `make_private` on it."""
    with quiet_torch():
        wrapped = TorchFSDP(model, **fsdp1_arguments())
    return wrapped, make_private(wrapped, privacy)


def ddp(model: nn.Module, **arguments: Any) -> nn.Module:
    return DistributedDataParallel(model, **arguments)


def private_after(shard: Sharding, model: nn.Module, privacy: PrivacyConfig) -> tuple[nn.Module, PrivacyEngine]:
    sharded = shard(model)
    return sharded, make_private(sharded, privacy)


BACKENDS: dict[str, Callable[[nn.Module, PrivacyConfig], tuple[nn.Module, PrivacyEngine]]] = {
    "plain": functools.partial(private_after, lambda model: model),
    "fsdp1": private_fsdp1,
    "fsdp1 shard_grad_op": functools.partial(private_fsdp1, strategy="SHARD_GRAD_OP"),
    "fsdp1 root only": functools.partial(private_fsdp1, units=False),
    "fsdp1 of torch": private_torch_fsdp1,
    "fsdp1 bf16": functools.partial(private_fsdp1, bf16=True),
    "fsdp1 no_shard": functools.partial(private_fsdp1, strategy="NO_SHARD"),
    "fsdp1 hybrid": functools.partial(private_fsdp1, strategy="HYBRID_SHARD"),
    "fsdp1 hybrid zero2": functools.partial(private_fsdp1, strategy="_HYBRID_SHARD_ZERO2"),
    "ddp": functools.partial(private_after, ddp),
    "zero1": functools.partial(private_after, ddp),
    "ddp finding unused": functools.partial(private_after, functools.partial(ddp, find_unused_parameters=True)),
    "fsdp2": functools.partial(private_after, fsdp2),
    "fsdp2 hybrid": functools.partial(private_after, fsdp2_hybrid),
    "fsdp2 root only": functools.partial(private_after, functools.partial(fsdp2, units=False)),
    "fsdp2 bf16": functools.partial(private_after, functools.partial(fsdp2, bf16=True)),
    "tp 2x2": functools.partial(private_after, functools.partial(tensor_parallel, data_size=2)),
    "tp 1x2": functools.partial(private_after, functools.partial(tensor_parallel, data_size=1)),
    "tp 2x2 split head": functools.partial(
        private_after, functools.partial(tensor_parallel, data_size=2, local_outputs=True, head=True)
    ),
    "tp 2x1": functools.partial(private_after, functools.partial(tensor_parallel, data_size=2)),
}


def optimizer_for(backend: str, name: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of that name; with ZeRO-1, each rank keeps the state of some parameters."""
    plain = OPTIMIZERS[name]
    if backend != "zero1":
        return plain(model.parameters())
    assert isinstance(plain, functools.partial)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its package scripts optimizers with torch.jit as it loads
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=plain.func, **plain.keywords)


def privacy_config(**changes: Any) -> PrivacyConfig:
    """No noise, and sampling that the test vouches for."""
    defaults: dict[str, Any] = {
        "noise_multiplier": 0.0,
        "expected_batch_size": EXPECTED_BATCH_SIZE,
        "dataset_size": 1000,
        "target_delta": 1e-5,
        "sampling": "external_poisson",
    }
    return PrivacyConfig(**(defaults | changes))


def seeded(attach: Callable[[], Any]) -> Any:
    """`attach()` with a fixed seed, whose warning is not what these tests are about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "seed fixed: no privacy guarantee", UserWarning)
        return attach()


# ------------------------------------------------------------------------------------------------- whole parameters


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def whole_parameters(model: nn.Module) -> Gradients:
    """Every trainable parameter, unsharded, on all ranks."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    with contextlib.ExitStack() as stack:
        if isinstance(model, TorchFSDP):
            stack.enter_context(TorchFSDP.summon_full_params(model, writeback=False))
        return {bare_name(n): whole(p) for n, p in model.named_parameters() if p.requires_grad}


class Reveal(torch.optim.Optimizer):
    """Its step puts every released gradient in its parameter's place, where `whole_parameters` can gather it."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.copy_(parameter.grad)


class Revealed:
    """A model whose releases can be read, whole and in the format of the parameters; each leaves it as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._optimizer = Reveal(model.parameters())
        self._before = [copy_of_local(p) for p in model.parameters()]

    def release(self) -> Gradients:
        """The private gradient of what is pending, on all ranks."""
        self._optimizer.step()
        revealed = whole_parameters(self.model)
        with torch.no_grad():
            for parameter, before in zip(self.model.parameters(), self._before, strict=True):
                local(parameter).copy_(before)
        return revealed


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def copy_of_local(x: Tensor) -> Tensor:
    """A copy of this rank's part."""
    return local(x).detach().clone()


# --------------------------------------------------------------------------------------------------------------- tasks


class Task(Protocol):
    """What all ranks do together; `run` is called on each, and rank 0's value comes back."""

    def run(self) -> Any: ...


def play(rank: int, world_size: int, tasks: Sequence[Task]) -> list[Any] | None:
    """Run the tasks one after another."""
    values = []
    for task in tasks:
        try:
            with quiet_torch():
                values.append(task.run())
        except Exception as error:
            error.add_note(f"in {task} on rank {rank} of {world_size}")
            raise
    return values if rank == 0 else None


def played(world_size: int, tasks: Sequence[Task]) -> dict[Any, Any]:
    """What became of each task on so many ranks, started once for all of them."""
    return dict(zip(tasks, run(play, world_size, tasks, timeout=500.0)[0], strict=True))


@dataclass(frozen=True, kw_only=True)
class Training:
    """A float64 run without noise, clipped at the median norm: how far it moves every parameter.

    With `sync_last_only`, FSDP is told to reduce in the last microbatch of a logical batch only, as loops that
    accumulate gradients do. With `dedicated`, sums travel on process groups of their own.
    """

    case: str
    backend: str
    loss_reduction: str = "mean"
    microbatch: int = 2
    empty_last: bool = False
    optimizer: str = "sgd"
    steps: int = 1
    sync_last_only: bool = False
    groups: Groups = FLAT
    dedicated: bool = False

    def run(self) -> Gradients:
        case = CASES[self.case]
        clipping = self.groups.clipping
        privacy = privacy_config(
            max_grad_norm=median_norm(self.case),
            loss_reduction=self.loss_reduction,
            clipping=clipping if isinstance(clipping, str) else dict(clipping),
            group_bounds=self.groups.bounds,
            clip_function=self.groups.clip_function,
        )
        model, engine = BACKENDS[self.backend](case.model(), privacy)
        if self.dedicated:
            engine.model.dedicate_groups()
        optimizer = optimizer_for(self.backend, self.optimizer, model)
        start = whole_parameters(model)
        inputs, targets = case.batch()
        for step in range(self.steps):
            microbatches = self._microbatches(engine, rows_of_step(case.rows, step))
            for left, (numbers, mask) in zip(reversed(range(len(microbatches))), microbatches, strict=True):
                held_back = reduction_held_back(model) if self.sync_last_only and left else contextlib.nullcontext()
                with held_back, engine.microbatch(mask):
                    losses = case.row_losses(model(inputs[numbers]), targets[numbers])
                    (losses.mean() if self.loss_reduction == "mean" else losses.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert engine.steps == self.steps, "every step of the optimizer is one release"
        engine.detach()
        return {name: p - start[name] for name, p in whole_parameters(model).items()}

    def _microbatches(self, engine: PrivacyEngine, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        split = {"rank": engine.model.data_rank, "size": engine.model.data_size}
        size = 1 if CASES[self.case].one_at_a_time else self.microbatch
        return share(rows, **split, microbatch=size, empty_last=self.empty_last)

    def error(self, moved: Gradients) -> float:
        """How far from the oracle."""
        expected = trained(
            self.case,
            steps=self.steps,
            optimizer=self.optimizer,
            expected_batch_size=EXPECTED_BATCH_SIZE,
            groups=self.groups,
            is_block=is_listed if self.backend == "plain" else is_unit,
        )
        return relative_error(moved, expected)


@contextlib.contextmanager
def reduction_held_back(model: nn.Module) -> Iterator[None]:
    """Plain FSDP would keep gradients on their ranks here."""
    with contextlib.ExitStack() as stack:
        if isinstance(model, TorchFSDP):
            stack.enter_context(model.no_sync())
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(False)
            stack.callback(model.set_requires_gradient_sync, True)
        yield


def disagreements(results: Mapping[Any, Any]) -> list[str]:
    """The trainings that did not end where the oracle ends."""
    errors = {task: task.error(moved) for task, moved in results.items() if isinstance(task, Training)}
    return [f"{error:.1e} {task}" for task, error in errors.items() if not error <= TOLERANCE]


@dataclass(frozen=True, kw_only=True)
class Releases:
    """Logical batches released one after another from the same parameters: the clipped sum of each, in float64.

    A batch is a tuple of row numbers; its rows start on another rank each time, and are run one a microbatch.
    """

    rows: str
    backend: str
    max_grad_norm: float
    batches: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32

    def run(self) -> list[Gradients]:
        case, (inputs, targets) = PRECISION_ROWS[self.rows]()
        privacy = privacy_config(max_grad_norm=self.max_grad_norm)
        model, engine = BACKENDS[self.backend](case.model(self.dtype), privacy)
        revealed, (rank, size) = Revealed(model), (engine.model.data_rank, engine.model.data_size)
        if inputs.is_floating_point():
            inputs = inputs.to(self.dtype)
        found: list[Gradients] = []
        for batch in self.batches:
            for numbers, mask in share(batch, rank=(rank + len(found)) % size, size=size, microbatch=1):
                with engine.microbatch(mask):
                    case.row_losses(model(inputs[numbers]), targets[numbers]).mean().backward()
            found.append({n: g.double() * EXPECTED_BATCH_SIZE for n, g in revealed.release().items()})
        engine.detach()
        return found

    def expected(self) -> list[Gradients]:
        """The oracle's clipped sums."""
        return _clipped_sums(self.rows, self.max_grad_norm, self.batches)


@functools.cache
def _clipped_sums(rows: str, max_grad_norm: float, batches: tuple[tuple[int, ...], ...]) -> list[Gradients]:
    case, (inputs, targets) = PRECISION_ROWS[rows]()
    model = case.model()
    drawn = [(inputs[list(batch)], targets[list(batch)]) for batch in batches]
    return [clipped_sum(row_gradients(model, some, case.row_losses), max_grad_norm) for some in drawn]


def one_by_one(rows: str, backend: str, max_grad_norm: float, **options: Any) -> Releases:
    """Every row a logical batch of its own."""
    count = len(PRECISION_ROWS[rows]()[1][0])
    batches = tuple((i,) for i in range(count))
    return Releases(rows=rows, backend=backend, max_grad_norm=max_grad_norm, batches=batches, **options)


def all_at_once(rows: str, backend: str, max_grad_norm: float, **options: Any) -> Releases:
    """All rows in one logical batch."""
    batches = (tuple(range(len(PRECISION_ROWS[rows]()[1][0]))),)
    return Releases(rows=rows, backend=backend, max_grad_norm=max_grad_norm, batches=batches, **options)


def excesses(results: Mapping[Any, Any], *, cast: float = 0.0) -> list[str]:
    """Rows whose contribution is longer than the bound. `cast`: what rounding a release to bfloat16 may add to it."""
    return [
        f"row {i}: {norm(of_row) / task.max_grad_norm:.9f} of the bound in {task}"
        for task, found in results.items()
        if isinstance(task, Releases) and all(len(batch) == 1 for batch in task.batches)
        for i, of_row in enumerate(found)
        if not norm(of_row) <= task.max_grad_norm * (1 + cast)
    ]


def low_precision_tolerance(task: Releases) -> float:
    """Relative to the norm of the oracle's clipped sum."""
    if "cancelling" in task.rows:  # certified slack shortens these rows, and it grows with the cancellation
        return 0.1
    return 2e-2 if "bf16" in task.backend or task.dtype == torch.bfloat16 else 1e-3


def inaccuracies(results: Mapping[Any, Any]) -> list[str]:
    """Releases in low precision that are further from the oracle's clipped sum than they may be."""
    return [
        f"batch {i}: {error:.1e} in {task}"
        for task, found in results.items()
        if isinstance(task, Releases)
        for i, (one, expected) in enumerate(zip(found, task.expected(), strict=True))
        if not (error := norm({n: one[n] - e for n, e in expected.items()}) / norm(expected))
        <= low_precision_tolerance(task)
    ]


def fail_if_any(problems: Sequence[str]) -> None:
    """Fail with the list of what is wrong."""
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)
