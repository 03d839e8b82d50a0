"""ε by step, computed once before training, so that no step waits for an accountant."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from fsdp_dp.accounting import schedule_for
from fsdp_dp.config import PrivacyConfig

MOST_POINTS = 30


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper bounds on ε after `steps[i]` releases."""

    steps: tuple[int, ...]
    epsilons: tuple[float, ...]

    def epsilon(self, step: int) -> float:
        """An upper bound on ε after `step` releases: the one of the next step count that was computed.

        Not an interpolation: ε is concave in the number of releases, so a straight line would lie below it.
        """
        return 0.0 if step == 0 else self.epsilons[bisect.bisect_left(self.steps, step)]

    @property
    def cap(self) -> float:
        """ε of all the releases that the run committed to at its start."""
        return self.epsilons[-1]


def plan_budget(privacy: PrivacyConfig, noise_multiplier: float, steps: int) -> Budget:
    """ε at no more than `MOST_POINTS` step counts up to `steps`, closest together where ε grows fastest."""
    points = min(steps, MOST_POINTS)
    counts = sorted({math.ceil(steps * (i / points) ** 2) for i in range(1, points + 1)})
    bounds = schedule_for(privacy, noise_multiplier, counts, privacy.target_delta)
    return Budget(steps=tuple(counts), epsilons=tuple(bound.upper for bound in bounds))
