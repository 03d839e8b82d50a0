"""Moments of the loss: a cheap upper bound, for the size of grids, for first guesses, and for what `tuning` composes.

Names: q is the sample rate, sigma the noise multiplier; x is an outcome in units of the sensitivity.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fsdp_dp.accountants.mechanism import Mechanism

if TYPE_CHECKING:
    from numpy.typing import NDArray


def upper_bound(mechanism: Mechanism, steps: int, delta: float) -> float:
    """A cheap upper bound from Renyi divergences, for the size of grids and for first guesses.

    Conversion: Balle et al. 2020 (arXiv 1905.09982), theorem 21.
    """
    bounds = (
        steps * log_moment / (order - 1) + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        for order, log_moment in log_moments(mechanism)
    )
    return max(0.0, min(bounds))


@lru_cache(maxsize=256)
def log_moments(mechanism: Mechanism) -> list[tuple[float, float]]:
    """(order, ln E_{x without the row} (with/without)^order), which is (order - 1) times the Renyi divergence."""
    sigma, q, _ = mechanism
    # Little noise makes quadratures long and needs no sharp bound.
    small = [1.01, 1.02, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.6, 1.8, 2.5] if sigma >= 0.05 else []
    large = [*range(2, 16), *range(16, 64, 4), *(2**power for power in range(6, 15))]
    if q == 1:
        return [(order, order * (order - 1) / (2 * sigma**2)) for order in (*small, *large)]
    return [(order, _log_moment_by_quadrature(mechanism, order)) for order in small] + [
        (float(order), _log_moment_by_sum(mechanism, order)) for order in large
    ]


def _log_moment_by_quadrature(mechanism: Mechanism, order: float) -> float:
    from scipy.special import logsumexp

    sigma, q, _ = mechanism
    span = order + 28 * sigma
    x = np.linspace(-14 * sigma, order + 14 * sigma, nodes(span, sigma))
    log_density = -((x / sigma) ** 2) / 2 - math.log(sigma * math.sqrt(2 * math.pi))
    return float(logsumexp(log_density + order * log_ratio(x, sigma, q))) + math.log(x[1] - x[0])


def _log_moment_by_sum(mechanism: Mechanism, order: int) -> float:
    """The binomial expansion of integer orders (Mironov et al. 2019, arXiv 1908.10530, section 3.3)."""
    from scipy.special import gammaln, logsumexp, xlog1py, xlogy

    sigma, q, _ = mechanism
    k = np.arange(order + 1)
    log_binomial = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    return float(logsumexp(log_binomial + xlog1py(order - k, -q) + xlogy(k, q) + k * (k - 1.0) / (2 * sigma**2)))


def log_ratio(x: NDArray[Any], sigma: float, q: float) -> NDArray[Any]:
    """r(x) = ln(with/without), of `PrivacyLoss`."""
    return np.logaddexp(np.log1p(-q), np.log(q) + (2 * x - 1) / (2 * sigma**2))


def nodes(span: float, sigma: float) -> int:
    """How many nodes the trapezoidal rule needs: it converges exponentially in both of these scales of r and of x."""
    return math.ceil(span / min(sigma / 50, sigma**2 / 4))
