"""From guesses to a lower bound on epsilon: the statistics of an audit in one run, without torch.

m canaries each took part or not, by a fair coin. An auditor who sees the releases gives each a score, guesses "in" for
the highest and "out" for the lowest, and says nothing about the rest. Under (epsilon, delta)-differential privacy not too
many guesses can be right (Steinke, Nasr and Jagielski, arXiv 2305.08846, Theorem 5.2); more than that is evidence.

Legend: m canaries, r guesses, v right ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

DEFAULT_CONFIDENCE = 0.999
_FEWEST_GUESSES = 8
_LARGEST_EPSILON = 100.0


@dataclass(frozen=True, kw_only=True)
class LowerBound:
    """An (epsilon, delta)-DP mechanism with a smaller epsilon gives this one with probability 1 - `confidence` at most.

    Attributes:
        epsilon: the lower bound; 0 if the guesses are no better than chance.
        guesses, right: of the number of guesses that gave it.
    """

    epsilon: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    right: int


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What was found beside what is claimed.

    Attributes:
        reach: what would have been found, with the same coins, had every score told them.
    """

    found: LowerBound
    claimed: float
    reach: float
    mechanism: dict[str, Any]

    @property
    def consistent(self) -> bool:
        """Whether the claim survives: the lower bound is not above the upper one."""
        return self.found.epsilon <= self.claimed

    @property
    def could_refute(self) -> bool:
        """Whether an engine without any noise would have been noticed."""
        return self.reach > self.claimed

    def as_dict(self) -> dict[str, Any]:
        return {
            "consistent": self.consistent,
            "could_refute": self.could_refute,
            "epsilon_claimed_at_most": self.claimed,
            "epsilon_found_at_most": self.reach,
            "lower_bound": asdict(self.found),
            "mechanism": self.mechanism,
        }

    def __str__(self) -> str:
        found = self.found
        words = "consistent" if self.consistent else "BROKEN: the claim is false, or the accountant's assumptions are"
        if not self.could_refute:
            words += ", as it had to be: these canaries cannot refute so large a claim"
        return "\n".join(
            [
                f"audit: {words}",
                *(f"  {name.replace('_', ' '):<24}{value}" for name, value in self.mechanism.items()),
                f"  {'guesses':<24}{found.guesses} of {found.canaries} canaries, {found.right} right",
                f"  {'epsilon at least':<24}{found.epsilon:.4g} (at delta {found.delta:g}, confidence {found.confidence:g})",
                f"  {'it could have found':<24}{self.reach:.4g}, from scores without noise",
                f"  {'epsilon claimed at most':<24}{self.claimed:.4g}",
            ]
        )


def p_value(*, canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """An upper bound on the probability of so many right guesses under (epsilon, delta)-differential privacy.

    **Formal guarantee.** Theorem 5.2 with the maximum over i taken as in Appendix D: with q = e^eps / (1 + e^eps) and
    W ~ Binomial(r, q), P[v or more right] <= P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i.
    """
    if not 0 <= right <= guesses <= canaries or epsilon < 0 or not 0 <= delta <= 1:
        raise ValueError(
            "p_value needs 0 <= right <= guesses <= canaries, epsilon >= 0 and delta in [0, 1], found "
            f"{right}, {guesses}, {canaries}, {epsilon} and {delta}"
        )
    coin = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    beta = float(coin.sf(right - 1))
    if not (delta and right):
        return beta
    below = np.cumsum(coin.pmf(np.arange(right - 1, -1, -1)))
    return min(1.0, beta + 2 * canaries * delta * float((below / np.arange(1, right + 1)).max()))


def epsilon_at_least(*, canaries: int, guesses: int, right: int, delta: float, confidence: float) -> float:
    """The largest epsilon that so many right guesses exclude at this confidence; 0.0 if they exclude none."""

    def excluded(epsilon: float) -> bool:
        found = p_value(canaries=canaries, guesses=guesses, right=right, epsilon=epsilon, delta=delta)
        return found <= 1 - confidence

    low, high = 0.0, 1.0
    if not excluded(low):
        return 0.0
    while excluded(high) and high < _LARGEST_EPSILON:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if excluded(middle) else (low, middle)
    return low


def guess_counts(canaries: int) -> list[int]:
    """The numbers of guesses that are tried: all canaries, and a half of it again and again. Chosen before looking."""
    counts, count = [], canaries - canaries % 2
    while count >= _FEWEST_GUESSES:
        counts.append(count)
        count = count // 4 * 2
    return counts


def right_guesses(scores: Sequence[float], included: Sequence[bool], guesses: int) -> int:
    """How many of the `guesses` boldest guesses, half "in" and half "out", are right."""
    order = sorted(range(len(scores)), key=scores.__getitem__)
    out, into = order[: guesses // 2], order[len(order) - guesses // 2 :]
    return sum(not included[i] for i in out) + sum(included[i] for i in into)


def reach(included: Sequence[bool], *, delta: float, confidence: float = DEFAULT_CONFIDENCE) -> float:
    """The lower bound of an auditor whose scores tell every coin."""
    return lower_bound([float(taken) for taken in included], included, delta=delta, confidence=confidence).epsilon


def lower_bound(
    scores: Sequence[float], included: Sequence[bool], *, delta: float, confidence: float = DEFAULT_CONFIDENCE
) -> LowerBound:
    """The best lower bound over `guess_counts`, each tested at its part of the error (Bonferroni).

    Args:
        scores: of each canary, higher where it seems to have taken part.
        included: whether it did.
        delta: of the claim.
        confidence: probability that the bound holds.

    Raises:
        ValueError: too few canaries, a score that is not finite, or lists of different lengths.
    """
    counts = guess_counts(len(scores))
    if not counts or len(scores) != len(included) or not all(map(math.isfinite, scores)):
        raise ValueError(
            f"lower_bound needs at least {_FEWEST_GUESSES} canaries, each with a finite score and a coin, found "
            f"{len(scores)} scores and {len(included)} coins"
        )
    of_each = 1 - (1 - confidence) / len(counts)
    tried = []
    for guesses in counts:
        right = right_guesses(scores, included, guesses)
        epsilon = epsilon_at_least(canaries=len(scores), guesses=guesses, right=right, delta=delta, confidence=of_each)
        tried.append((epsilon, guesses, right))
    epsilon, guesses, right = max(tried)
    return LowerBound(
        epsilon=epsilon, delta=delta, confidence=confidence, canaries=len(scores), guesses=guesses, right=right
    )
