"""Clipping bounds that follow a quantile of the norms, found privately. Pure functions.

In the step: at each release the engine counts, for every clipping group, the rows that were within the bound; the noised
share moves the bound for the logical batches after it. Andrew, Thakkar, McMahan, Ramaswamy (arXiv 1905.03871),
algorithm 1; for several groups at once He et al. (arXiv 2212.01539).

**Formal guarantee.** One release is a Gaussian mechanism on two vectors: the clipped sum, which a row moves by at most R,
under noise ``sigma_g R``; and the K counts of ±1/2, which it moves by at most ``sqrt(K)/2``, under noise ``sigma_b``.
Divided by their noise, the two together move by at most ``sqrt(1/sigma_g^2 + K/(4 sigma_b^2)) = 1/sigma``: the release
costs what a single Gaussian of noise multiplier sigma costs. Bounds are post-processing, fixed within a logical batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fsdp_dp.config import AdaptiveBounds

_GRID = 2.0**10
"""Noise is rounded to multiples of 1/_GRID, and counts are multiples of 1/2: their sum is exact, and a rounding of count
plus noise (post-processing). A coarse grid holds many float64 numbers a cell, so that cells are equally likely."""

CEILING = 2.0**64
"""No bound grows beyond this times its first value: public, out of reach of quantiles, and within float32's range."""


def split_noise(noise_multiplier: float, groups: int, options: AdaptiveBounds | None) -> tuple[float, float]:
    """``(sigma_g, sigma_b)``: noise multiplier of the gradients, standard deviation of the noise on each count.

    Args:
        noise_multiplier: sigma, the one that is accounted.
        groups: K.
        options: None if bounds are fixed; all noise is then the gradients'.
    """
    if options is None:
        return noise_multiplier, 0.0
    share = options.budget_fraction
    return noise_multiplier / math.sqrt(1 - share), noise_multiplier * math.sqrt(groups / (4 * share))


def next_bounds(
    bounds: Sequence[float],
    first: Sequence[float],
    excess: Sequence[float],
    noise: Sequence[float],
    expected_batch_size: int,
    options: AdaptiveBounds,
) -> tuple[float, ...]:
    """The bounds after a release.

    Args:
        bounds: of the groups, now.
        first: where they started; none falls below ``options.floor`` times that, or rises above `CEILING` times that.
        excess: for each group, rows within the bound less rows beyond it, halved.
        noise: for each group, a normal of standard deviation ``sigma_b``.
        expected_batch_size: divides the noised counts, whatever the batch really held.
    """
    return tuple(
        min(max(options.floor * start, bound * _factor(share, options)), CEILING * start)
        for bound, start, share in zip(bounds, first, _shares(excess, noise, expected_batch_size), strict=True)
    )


def _factor(share: float, options: AdaptiveBounds) -> float:
    largest = math.log(CEILING / options.floor)  # from the floor to the ceiling
    return math.exp(min(-options.learning_rate * (share - options.target_quantile), largest))


def _shares(excess: Sequence[float], noise: Sequence[float], expected_batch_size: int) -> list[float]:
    noised = [count + math.floor(x * _GRID + 0.5) / _GRID for count, x in zip(excess, noise, strict=True)]
    return [0.5 + count / expected_batch_size for count in noised]
