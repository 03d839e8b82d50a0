"""What several runs on one data set cost together: all of them seen, or only the best of a random number of them.

`composed_epsilon` is plain composition: every release of every trial counts. `selection_epsilon` is the result of Papernot
and Steinke (Hyperparameter tuning with Renyi differential privacy, arXiv 2110.03620, theorem 2) for a truncated negative
binomial number of trials of which only the winner is released. No torch here.

Names: eta is the shape of that distribution, gamma its parameter (definition 1 of the paper); an order is Renyi's.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from fsdp_dp import accounting
from fsdp_dp.accountants import renyi
from fsdp_dp.accounting import AccountingError, EpsilonBounds, Mechanism
from fsdp_dp.config import AccountantName, require_integer, require_number


class Trial(NamedTuple):
    """One run: `releases` of one mechanism."""

    mechanism: Mechanism
    releases: int


def composed_epsilon(trials: Sequence[Trial], delta: float, accountant: AccountantName) -> EpsilonBounds:
    """Bound epsilon at `delta` of all releases of all trials, each of which may depend on what was seen before.

    Trials of one mechanism are one long run for the accountant. Different ones are composed by their Renyi divergences,
    which add up: an upper bound, 5 to 40 % above.

    **Formal guarantee**: that of `accounting.epsilon`, for the union of the releases.

    Raises:
        ValueError: delta is not in (0, 1).
        AccountingError: mechanisms differ, and one cuts its draws (`max_batch_size`): no Renyi divergence is known of that;
            or one has next to no noise, which leaves the range of its arithmetic.
    """
    _require_delta(delta)
    releases: Counter[Mechanism] = Counter()
    for mechanism, count in trials:
        require_integer("releases", count, at_least=0)
        releases[mechanism] += count
    if len(releases) == 1:
        ((mechanism, count),) = releases.items()
        return accounting.epsilon(
            noise_multiplier=mechanism.noise_multiplier,
            sample_rate=mechanism.sample_rate,
            steps=count,
            delta=delta,
            accountant=accountant,
            cap=mechanism.cap,
        )
    upper = _least(renyi_divergences(trials), delta)
    return EpsilonBounds(0.0, upper, upper)


def selection_epsilon(trial: Trial, delta: float, *, eta: float, gamma: float) -> float:
    """Bound epsilon at `delta` of releasing the best of K trials, where K follows `draw_number(eta, gamma)`.

    **Formal guarantee**: holds if K was drawn independently of the data and stays secret; each trial draws its options
    from one fixed distribution, and whatever it draws costs at most what `trial` does; the best is chosen by what a trial
    releases alone (its weights, scored on data that need no protection); and nothing else of any trial is seen.

    Raises:
        ValueError: eta is not above -1, gamma not in (0, 1), or delta not in (0, 1).
        AccountingError: draws are cut, or there is next to no noise: no Renyi divergence is known.
    """
    _require_delta(delta)
    return _least(selected(renyi_divergences([trial]), eta=eta, gamma=gamma), delta)


def selected(divergences: Sequence[tuple[float, float]], *, eta: float, gamma: float) -> list[tuple[float, float]]:
    """The Renyi divergences of the winner from those of one trial, as (order, bound).

    Theorem 2: eps' = eps + (1 + eta) (1 - 1/order^) eps^ + (1 + eta) ln(1/gamma) / order^ + ln E[K] / (order - 1), for
    whichever second order^, with eps^ its divergence, makes it least.
    """
    mean = mean_number(eta=eta, gamma=gamma)
    constant = (1 + eta) * min((1 - 1 / order) * bound + math.log(1 / gamma) / order for order, bound in divergences)
    return [(order, bound + constant + math.log(mean) / (order - 1)) for order, bound in divergences]


def mean_number(*, eta: float, gamma: float) -> float:
    """E[K]; for eta = 1, the geometric distribution, it is 1/gamma."""
    _require_distribution(eta, gamma)
    if eta == 0:
        return (1 / gamma - 1) / math.log(1 / gamma)
    return eta * (1 - gamma) / gamma / -math.expm1(eta * math.log(gamma))


def gamma_for(mean: float, *, eta: float) -> float:
    """The gamma at which K is `mean` on average, rounded to the side that costs more."""
    require_number("mean", mean, above=1.0)
    low, high = 1e-300, 1 - 1e-12
    for _ in range(2000):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if mean_number(eta=eta, gamma=middle) > mean else (low, middle)
        if high - low <= 1e-12 * high:
            break
    return low


def draw_number(*, eta: float, gamma: float, source: random.Random) -> int:
    """K >= 1, by inversion of its distribution function (definition 1); `source` has to be secret and random."""
    probability = first_probability(eta=eta, gamma=gamma)
    number, left = 1, source.random()
    while left > probability and probability > 0:
        left -= probability
        probability *= (1 - gamma) * (number + eta) / (number + 1)
        number += 1
    return number


def first_probability(*, eta: float, gamma: float) -> float:
    """P[K = 1]; each further one is (1 - gamma) (k + eta) / (k + 1) times the one before."""
    _require_distribution(eta, gamma)
    if eta == 0:
        return (1 - gamma) / math.log(1 / gamma)
    return eta * (1 - gamma) / math.expm1(-eta * math.log(gamma))


def renyi_divergences(trials: Sequence[Trial]) -> list[tuple[float, float]]:
    """(order, bound) for all trials together: divergences of one order add up."""
    if not trials:
        raise ValueError("trials must name at least one run, found none")
    for mechanism, _ in trials:
        if mechanism.cap is not None or mechanism.noise_multiplier == 0:
            raise AccountingError(
                "no Renyi divergence is known of draws that are cut (max_batch_size), nor without noise; runs of one "
                "mechanism can be composed by accountant='pld', others only without max_batch_size"
            )
        if mechanism.noise_multiplier < accounting.SMALLEST_NOISE:
            raise AccountingError(
                f"a noise multiplier of {mechanism.noise_multiplier:.3g} is below {accounting.SMALLEST_NOISE}, and leaves "
                "the range of the arithmetic: no cost can be stated"
            )
    moments = [renyi.log_moments(mechanism) for mechanism, _ in trials]
    common = set.intersection(*({order for order, _ in of_trial} for of_trial in moments))
    totals = dict.fromkeys(sorted(common), 0.0)
    for of_trial, (_, releases) in zip(moments, trials, strict=True):
        for order, log_moment in of_trial:
            if order in totals:
                totals[order] += releases * log_moment / (order - 1)
    return list(totals.items())


def _least(divergences: Sequence[tuple[float, float]], delta: float) -> float:
    """The least epsilon at `delta` that any order gives."""
    return max(0.0, min(_converted(order, bound, delta) for order, bound in divergences))


def _converted(order: float, bound: float, delta: float) -> float:
    """From Renyi to (epsilon, delta): Balle et al. 2020 (arXiv 1905.09982), theorem 21."""
    return bound + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


def _require_delta(delta: float) -> None:
    require_number("delta", delta, above=0.0, below=1.0)


def _require_distribution(eta: float, gamma: float) -> None:
    require_number("eta", eta, above=-1.0)
    require_number("gamma", gamma, above=0.0, below=1.0)
