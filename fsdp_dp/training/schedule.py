"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from fsdp_dp.training.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step 1..steps: linear warm-up to `config.learning_rate`, then the schedule down towards zero."""
    warmup = min(config.warmup_steps, steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / (steps - warmup + 1)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": (1.0 + math.cos(math.pi * progress)) / 2,
    }
    return config.learning_rate * shape[config.schedule]
