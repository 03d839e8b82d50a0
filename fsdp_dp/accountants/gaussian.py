"""Without subsampling: exact."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fsdp_dp.accountants.mechanism import EpsilonBounds, Mechanism


def compose(mechanism: Mechanism, counts: Sequence[int], delta: float) -> list[EpsilonBounds]:
    """Gaussians compose to a Gaussian of mu = sqrt(steps) / noise_multiplier, whose curve is known in closed form."""
    return [epsilon(math.sqrt(count) / mechanism.noise_multiplier, delta) for count in counts]


def epsilon(mu: float, delta: float) -> EpsilonBounds:
    """Solve delta = Phi(mu/2 - eps/mu) - exp(eps) Phi(-mu/2 - eps/mu) for eps (Balle, Wang 2018, theorem 8)."""
    from scipy.special import log_ndtr

    def exceeds(eps: float) -> bool:
        log_with, log_without = log_ndtr(mu / 2 - eps / mu), eps + log_ndtr(-mu / 2 - eps / mu)
        return math.exp(log_with) * -math.expm1(min(0.0, log_without - log_with)) > delta

    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if exceeds(middle) else (low, middle)
    # The margin covers the rounding of the curve.
    return EpsilonBounds(low * (1 - 1e-9), (low + high) / 2, high * (1 + 1e-9))
