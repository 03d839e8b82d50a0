"""One side of a plan: the step as configured, and the largest thing that fits."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from fsdp_dp.planning.depth import predict
from fsdp_dp.planning.options import PlanConfig
from fsdp_dp.planning.search import largest, most_layers
from fsdp_dp.planning.trace import Step, Trace


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The step as configured, and what the search found (0: nothing fits; None: not asked)."""

    trace: Trace
    largest: int | None = None


def answer(config: PlanConfig, side: str) -> Answer:
    """Trace a side, and search as `config.plan` asks."""
    options, limit = config.plan, rows_of_a_rank(config)
    configured = Step(
        config=config,
        world_size=options.world_size,
        side=side,
        microbatch_size=config.microbatch_size,
        accumulates=config.microbatch_size < limit,
        activation_checkpointing=options.activation_checkpointing,
    )

    @functools.cache
    def of_rows(rows: int) -> Trace:
        return predict(replace(configured, microbatch_size=rows, accumulates=rows < limit))

    found = None
    if options.search == "microbatch":
        found = largest(lambda n: of_rows(n).peak.total(), config.microbatch_size, options.usable_bytes, limit)
    elif options.search == "model":
        found = most_layers(configured, options.usable_bytes)
    return Answer(trace=of_rows(config.microbatch_size), largest=found)


def rows_of_a_rank(config: PlanConfig) -> int:
    """Rows that a data-parallel rank is given in a step, in expectation."""
    return math.ceil(config.batch_size / (config.plan.world_size // config.sharding.tensor_parallel_size))
