"""What to plan for, checked before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field

from fsdp_dp.config import require_choice, require_integer, require_number
from fsdp_dp.models.config import GPTConfig
from fsdp_dp.training.schema import TrainConfig

SIDES = ("plain", "flat", "block", "layer", "parameter")
FSDP1 = ("full_shard", "shard_grad_op", "hybrid_shard", "hybrid_shard_zero2")
STRATEGIES = (*FSDP1, "fully_shard", "hybrid_shard_fsdp2", "tensor_parallel", "ddp", "zero1")
SEARCHES = ("microbatch", "model", "none")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The machine, and what is asked about it.

    Args:
        world_size: ranks, that is devices.
        device_memory_gib: of one device. An H100 of 80 GB offers 79.
        headroom: share of it to leave free, for what torch does not allocate: the CUDA context, NCCL, fragments.
        activation_checkpointing: each block is recomputed in backward (non-reentrant).
        sides: what to compare: plain FSDP, and private training with these clipping groups.
        search: the largest `microbatch` that fits, the largest Llama-like `model`, or `none`.
    """

    world_size: int = 8
    device_memory_gib: float = 79.0
    headroom: float = 0.06
    activation_checkpointing: bool = False
    sides: list[str] = field(default_factory=lambda: ["plain", "flat", "block", "layer"])
    search: str = "microbatch"

    def __post_init__(self) -> None:
        require_integer("plan.world_size", self.world_size, at_least=1)
        require_number("plan.device_memory_gib", self.device_memory_gib, above=0.0)
        require_number("plan.headroom", self.headroom, at_least=0.0, below=1.0)
        require_choice("plan.search", self.search, SEARCHES)
        if not self.sides:
            raise ValueError(f"plan.sides must name at least one of {', '.join(SIDES)}, found none.")
        for side in self.sides:
            require_choice("plan.sides", side, SIDES)

    @property
    def usable_bytes(self) -> int:
        """Of one device, for what torch allocates."""
        return int(self.device_memory_gib * (1 - self.headroom) * 2**30)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """A run of `fsdp_dp.train`, and the machine that it is planned for."""

    plan: PlanOptions = field(default_factory=PlanOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharding.strategy not in STRATEGIES:
            raise ValueError(
                f"sharding={self.sharding.strategy} cannot be planned: choose {', '.join(STRATEGIES)} for the plan. In fp32, "
                "no_shard holds what ddp does, less DDP's buckets, which are as large as the parameters."
            )
        if not isinstance(self.model, GPTConfig):
            raise ValueError(
                f"Plans are for model.architecture=gpt and llama, whose blocks repeat, found {self.model.architecture}."
            )


def decoder(config: TrainConfig) -> GPTConfig:
    """The model, of the kind that can be planned."""
    assert isinstance(config.model, GPTConfig)
    return config.model
