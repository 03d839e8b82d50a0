"""The loss of one release: ln(P/Q) at an outcome drawn from P.

P is with the row and Q without it in the direction "remove", and the other way round in "add". q is the sample rate, sigma
the noise multiplier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fsdp_dp.accountants import renyi
from fsdp_dp.accountants.mechanism import Mechanism

if TYPE_CHECKING:
    from numpy.typing import NDArray

Direction = Literal["add", "remove"]


@dataclass(frozen=True)
class PrivacyLoss:
    """The loss of one release in one direction, with 0 < sample_rate < 1.

    In units of the sensitivity an outcome x is N(0, sigma^2) without the row and the mixture (1-q) N(0, sigma^2) +
    q N(1, sigma^2) with it. r(x) = ln(with/without) = ln(1-q + q exp((2x-1) / (2 sigma^2))) grows with x. The loss is
    r(x) for x drawn with the row ("remove"), -r(x) for x drawn without ("add"). prv-accountant has the first only.
    It was the larger wherever both were run; we rely on no proof that it is for every composition.
    """

    mechanism: Mechanism
    direction: Direction

    def masses(self, edges: NDArray[Any]) -> NDArray[Any]:
        """The probability of the loss in each cell between increasing `edges`."""
        if self.direction == "remove":
            return self._outcome_masses(self._outcome(edges))
        return self._outcome_masses(self._outcome(-edges[::-1]))[::-1]

    def mean(self) -> float:
        """The expected loss, by the trapezoidal rule, which converges exponentially here."""
        sigma, q, _ = self.mechanism
        x = np.linspace(-14 * sigma, 1 + 14 * sigma, renyi.nodes(1 + 28 * sigma, sigma))
        log_ratio = renyi.log_ratio(x, sigma, q)
        without = np.exp(-((x / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
        if self.direction == "add":
            return float(np.trapezoid(-log_ratio * without, x))
        shifted = np.exp(-(((x - 1) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
        return float(np.trapezoid(log_ratio * ((1 - q) * without + q * shifted), x))

    def _outcome(self, log_ratio: NDArray[Any]) -> NDArray[Any]:
        """The x at which r(x) is `log_ratio`; minus infinity where r is always more."""
        sigma, q, _ = self.mechanism
        scaled = np.expm1(log_ratio) / q
        near = np.log1p(np.maximum(scaled, -1.0))
        far = log_ratio - np.log(q) + np.log1p(-(1 - q) * np.exp(-log_ratio))
        return sigma**2 * np.where(log_ratio < 40, near, far) + 0.5

    def _outcome_masses(self, x: NDArray[Any]) -> NDArray[Any]:
        """The probability of each cell between increasing outcomes `x`, with the row or without it."""
        sigma, q, _ = self.mechanism
        without = _normal_masses(x / sigma)
        return without if self.direction == "add" else (1 - q) * without + q * _normal_masses((x - 1) / sigma)


def _normal_masses(edges: NDArray[Any]) -> NDArray[Any]:
    """The standard normal probability of each cell, by differences of the smaller tail."""
    from scipy.special import ndtr

    left, right = edges[:-1], edges[1:]
    return np.where(left > 0, ndtr(-left) - ndtr(-right), ndtr(right) - ndtr(left))
