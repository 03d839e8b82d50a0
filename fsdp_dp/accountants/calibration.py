"""The search for the noise that a budget asks for."""

from __future__ import annotations

import math
from collections.abc import Callable

from fsdp_dp.accountants.mechanism import LARGEST_NOISE, SMALLEST_NOISE, AccountingError

# How far below the target calibration may stop.
CALIBRATION_SLACK = 3e-3


def search(upper: Callable[[float], float], model: Callable[[float], float], target: float) -> float:
    """A noise multiplier with `upper` in [(1 - CALIBRATION_SLACK) * target, target].

    `model` follows `upper` up to a slowly varying ratio: each round solves the model for the ratio last seen, and
    bisects instead where that leaves the bracket.
    """
    # Just outside the range, so that its ends may be tried, once.
    too_little, enough = SMALLEST_NOISE * (1 - 1e-6), LARGEST_NOISE * (1 + 1e-6)
    ratio, found, guess = 1.0, math.nan, math.nan
    while enough / too_little > 1 + CALIBRATION_SLACK / 100:
        guess = _solve(model, (1 - CALIBRATION_SLACK / 2) * target / ratio)
        if not too_little < guess < enough:
            guess = math.sqrt(too_little * enough)
        found = upper(guess)
        if (1 - CALIBRATION_SLACK) * target <= found <= target:
            return guess
        too_little, enough = (guess, enough) if found > target else (too_little, guess)
        ratio = max(found, 1e-12) / max(model(guess), 1e-12)
    raise AccountingError(f"the search ended at noise multiplier {guess:.4g}, with epsilon {found:.4g}")


def _solve(model: Callable[[float], float], value: float) -> float:
    """The noise multiplier at which the decreasing `model` takes `value`, or the nearer end of the range."""
    low, high = math.log(SMALLEST_NOISE), math.log(LARGEST_NOISE)
    for noise_multiplier in (SMALLEST_NOISE, LARGEST_NOISE):
        if (model(noise_multiplier) > value) == (noise_multiplier == LARGEST_NOISE):
            return noise_multiplier
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if model(math.exp(middle)) > value else (low, middle)
    return math.exp(high)
