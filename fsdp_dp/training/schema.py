"""The configuration of a run as typed, frozen dataclasses: what `conf/` may say, checked before torch is loaded.

Hydra checks names and types against these classes; each `__post_init__` checks values. Every message names the option
as it is written on the command line, what was found, and what is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, get_args

from fsdp_dp.config import (
    AccountantName,
    AdaptiveBounds,
    ClipFunction,
    Numerics,
    require_choice,
    require_group_bounds,
    require_groups,
    require_integer,
    require_number,
)
from fsdp_dp.data.config import DataConfig, check_fit
from fsdp_dp.models.config import GPTConfig, ModelConfig

HYBRIDS = ("hybrid_shard", "hybrid_shard_zero2", "hybrid_shard_fsdp2")
REPLICATED = ("ddp", "zero1")
SHARDINGS = ("full_shard", "shard_grad_op", "no_shard", "fully_shard", "tensor_parallel", *HYBRIDS, *REPLICATED)
MECHANISMS = ("dp_sgd", "none")
SAMPLINGS = ("poisson", "shuffle")
OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """How the model is split.

    Args:
        strategy: `full_shard`, `shard_grad_op`, `no_shard`, `hybrid_shard`, `hybrid_shard_zero2` (FSDP1); `fully_shard`,
            `hybrid_shard_fsdp2` (FSDP2); `tensor_parallel` with FSDP2; `ddp`; `zero1` (DDP, optimizer state split).
        tensor_parallel_size: ranks over which `tensor_parallel` splits layers.
        replicate_size: copies of the sharded model, with the hybrid strategies, or above `tensor_parallel`.
    """

    strategy: str = "full_shard"
    tensor_parallel_size: int = 1
    replicate_size: int = 1

    def __post_init__(self) -> None:
        require_choice("sharding.strategy", self.strategy, SHARDINGS)
        require_integer("sharding.tensor_parallel_size", self.tensor_parallel_size, at_least=1)
        if (self.strategy == "tensor_parallel") != (self.tensor_parallel_size > 1):
            raise ValueError(
                "sharding.tensor_parallel_size must be at least 2 with sharding=tensor_parallel and 1 otherwise, "
                f"found {self.tensor_parallel_size} with sharding.strategy={self.strategy}."
            )
        require_integer("sharding.replicate_size", self.replicate_size, at_least=2 if self.strategy in HYBRIDS else 1)
        if self.replicate_size > 1 and self.strategy not in (*HYBRIDS, "tensor_parallel"):
            raise ValueError(
                f"sharding.replicate_size is for {', '.join(HYBRIDS)} and tensor_parallel, found {self.replicate_size} with "
                f"sharding.strategy={self.strategy}."
            )


@dataclass(frozen=True, kw_only=True)
class PrivacyOptions:
    """What decides ε; with `batch_size`, `steps` and the data's size it becomes a `fsdp_dp.PrivacyConfig`."""

    mechanism: str = "dp_sgd"
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    target_delta: float = 1e-6
    max_grad_norm: float = 0.5
    sampling: str = "poisson"
    max_batch_size: int | None = None
    numerics: str = "certified"
    accountant: str = "prv"
    seed: int | None = None

    def __post_init__(self) -> None:
        require_choice("privacy.mechanism", self.mechanism, MECHANISMS)
        require_choice("privacy.sampling", self.sampling, SAMPLINGS)
        require_choice("privacy.numerics", self.numerics, get_args(Numerics))
        require_choice("privacy.accountant", self.accountant, get_args(AccountantName))
        require_number("privacy.target_delta", self.target_delta, above=0.0, below=1.0)
        require_number("privacy.max_grad_norm", self.max_grad_norm, above=0.0)
        if self.seed is not None:
            require_integer("privacy.seed", self.seed, at_least=0)
        self._check_noise_or_budget()

    @property
    def private(self) -> bool:
        """Whether gradients are clipped and noised at all."""
        return self.mechanism != "none"

    def _check_noise_or_budget(self) -> None:
        if self.target_epsilon is not None:
            require_number("privacy.target_epsilon", self.target_epsilon, above=0.0)
        if self.noise_multiplier is not None:
            require_number("privacy.noise_multiplier", self.noise_multiplier, at_least=0.0)
        given = [name for name in ("target_epsilon", "noise_multiplier") if getattr(self, name) is not None]
        if given and not self.private:
            raise ValueError(f"privacy.{given[0]} has no effect with privacy=none: choose privacy=eps8, eps3 or eps1.")
        if self.private and len(given) != 1:
            raise ValueError(
                "Exactly one of privacy.target_epsilon and privacy.noise_multiplier is needed, found "
                f"{self.target_epsilon} and {self.noise_multiplier}. To set the noise yourself: "
                "privacy.noise_multiplier=1.0 privacy.target_epsilon=null"
            )


@dataclass(frozen=True, kw_only=True)
class ClippingOptions:
    """How `privacy.max_grad_norm` is divided and kept to: see `fsdp_dp.PrivacyConfig`, whose names are in brackets.

    `groups` (`clipping`) and `bounds` (`group_bounds`) are words or mappings.
    """

    groups: Any = "flat"
    bounds: Any = "uniform"
    clip_function: str = "abadi"
    stability: float = 0.01
    adaptive: Any = None

    @property
    def adaptive_bounds(self) -> AdaptiveBounds | None:
        """`adaptive` checked."""
        if self.adaptive is None:
            return None
        known = [f.name for f in fields(AdaptiveBounds)]
        if not isinstance(self.adaptive, dict) or not set(self.adaptive) <= set(known):
            raise ValueError(
                f"clipping.adaptive must be null or a mapping of {', '.join(known)}, found {self.adaptive}."
            )
        try:
            return AdaptiveBounds(**self.adaptive)
        except ValueError as error:
            raise ValueError(str(error).replace("adaptive_bounds.", "clipping.adaptive.", 1)) from None

    def __post_init__(self) -> None:
        require_groups("clipping.groups", self.groups)
        require_group_bounds("clipping.bounds", self.bounds)
        if self.adaptive_bounds is not None and self.clip_function != "abadi":
            raise ValueError(f"clipping.adaptive needs clipping.clip_function=abadi, found {self.clip_function}.")
        require_choice("clipping.clip_function", self.clip_function, get_args(ClipFunction))
        require_number("clipping.stability", self.stability, above=0.0)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """A torch optimizer and its learning rate: a linear warm-up, then `schedule` over the remaining steps.

    With `average_decay`, weights are averaged over releases (`fsdp_dp.averaging`), and the average is what is evaluated.
    """

    name: str = "adamw"
    learning_rate: float = 1e-2
    schedule: str = "cosine"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    momentum: float = 0.0
    average_decay: float | None = None

    def __post_init__(self) -> None:
        require_choice("optimizer.name", self.name, OPTIMIZERS)
        require_choice("optimizer.schedule", self.schedule, SCHEDULES)
        require_number("optimizer.learning_rate", self.learning_rate, above=0.0)
        require_integer("optimizer.warmup_steps", self.warmup_steps, at_least=0)
        require_number("optimizer.weight_decay", self.weight_decay, at_least=0.0)
        for name in ("beta1", "beta2", "momentum"):
            require_number(f"optimizer.{name}", getattr(self, name), at_least=0.0, below=1.0)
        if self.average_decay is not None:
            require_number("optimizer.average_decay", self.average_decay, at_least=0.0, below=1.0)


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number format of forward and backward: `fp32`, or `bf16` (parameters and summed gradients stay fp32)."""

    compute: str = "fp32"

    def __post_init__(self) -> None:
        require_choice("precision.compute", self.compute, PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run.

    Args:
        steps: optimizer steps, which are releases: fixed at the start, and so the budget.
        batch_size: rows per step over all ranks; with privacy the *expected* number, for rows are drawn.
        microbatch_size: rows per forward and backward on one rank (memory and speed, not privacy).
        evaluate_every: steps between evaluations on `evaluate_rows` held-out rows; the last one uses all of them.
        seed: of the initial weights, dropout and, with privacy=none, the batches; the noise never uses it.
        diagnostics: write down what ε does not cover (losses, norms, throughput), and evaluate; false does neither.
        checkpoint_every: steps between checkpoints; a crash costs at most a quarter more releases than that.
        resume: go on with the run in `output_dir`, if there is one, instead of refusing its folder.
        device: `auto` takes CUDA where there is one.
        output_dir: the run directory, made by rank 0; null makes a new one under outputs/.
    """

    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    model: ModelConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    privacy: PrivacyOptions = field(default_factory=lambda: PrivacyOptions(target_epsilon=8.0))
    clipping: ClippingOptions = field(default_factory=ClippingOptions)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    steps: int = 150
    batch_size: int = 512
    microbatch_size: int = 64
    evaluate_every: int = 25
    evaluate_rows: int = 1024
    diagnostics: bool = True
    checkpoint_every: int = 50
    resume: bool = False
    seed: int = 0
    device: str = "auto"
    output_dir: str | None = None

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "microbatch_size", "evaluate_every", "evaluate_rows", "checkpoint_every")
        for name in counts:
            require_integer(name, getattr(self, name), at_least=1)
        if self.resume and self.output_dir is None:
            raise ValueError("resume=true needs output_dir, the folder of the run to go on with, found null.")
        require_integer("seed", self.seed, at_least=0)
        require_choice("device", self.device, DEVICES)
        if self.optimizer.average_decay is not None and not self.privacy.private:
            raise ValueError(
                "optimizer.average_decay averages the weights of private releases, which privacy=none has not: leave it null "
                "there, or choose privacy=eps8, eps3 or eps1."
            )
        if self.sharding.strategy in REPLICATED and self.precision.compute != "fp32":
            raise ValueError(
                f"precision={self.precision.compute} is a policy of FSDP, which sharding={self.sharding.strategy} does not "
                "have: choose precision=fp32, or sharding=no_shard or shard_grad_op."
            )
        check_fit(self.data, self.model)
        size = self.sharding.tensor_parallel_size
        if size > 1 and not self.model.tensor_parallel_parts:
            raise ValueError(
                f"sharding=tensor_parallel splits model.architecture=gpt and llama, found {self.model.architecture}: choose "
                "another sharding, such as fully_shard."
            )
        for name, found in self.model.tensor_parallel_parts.items():
            if found % size:
                raise ValueError(
                    f"model.{name} must be a multiple of sharding.tensor_parallel_size={size}, found {found}."
                )


def check_world(config: TrainConfig, world_size: int) -> None:
    """Raise ValueError when this many processes cannot run `config`."""
    size = config.sharding.tensor_parallel_size
    parts = size * config.sharding.replicate_size
    if world_size % parts:
        raise ValueError(
            "sharding.tensor_parallel_size * sharding.replicate_size must divide the number of processes, which is "
            f"{world_size}, found {parts}: start with torchrun --nproc-per-node={parts}, or change sharding."
        )
    if config.batch_size < world_size // size:
        raise ValueError(
            f"batch_size must be at least one row for each of {world_size // size} data-parallel ranks, "
            f"found {config.batch_size}."
        )
