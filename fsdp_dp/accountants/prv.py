"""The privacy loss, discretised and composed with Fourier transforms: prv-accountant.

Gopi, Lee, Wutschitz 2021, arXiv 2106.02848.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from fsdp_dp.accountants import renyi
from fsdp_dp.accountants.mechanism import (
    DELTA_ERROR_SHARE,
    SMALLEST_NOISE,
    AccountingError,
    EpsilonBounds,
    Mechanism,
)
from fsdp_dp.accountants.privacy_loss import Direction, PrivacyLoss

# Half the width of the bounds as a share of epsilon: wanted, and accepted where the grid would pass FINE_GRID cells.
FINE_ERROR, COARSE_ERROR = 2e-3, 2e-2
FINE_GRID, LARGEST_GRID = 2**19, 2**22
# The first pass, which only has to say how large epsilon is and which direction matters.
SCOUT_ERROR = 5e-2


def compose(mechanism: Mechanism, counts: Sequence[int], delta: float) -> list[EpsilonBounds]:
    """Both directions roughly, then finely those that may be the larger one at some step count."""
    if mechanism.noise_multiplier < SMALLEST_NOISE:
        raise AccountingError(f"noise multipliers below {SMALLEST_NOISE} leave the range of its arithmetic")
    cells_per_error = _cells_per_error(mechanism, counts[-1], delta)
    scout_error = max(SCOUT_ERROR * renyi.upper_bound(mechanism, counts[-1], delta), cells_per_error / FINE_GRID)
    scouts = {
        direction: in_direction(PrivacyLoss(mechanism, direction), counts, delta, scout_error)
        for direction in get_args(Direction)
    }
    largest = [_larger(*bounds) for bounds in zip(*scouts.values(), strict=True)]
    scale = largest[-1].estimate
    if scale <= 0:
        return largest
    error = min(max(FINE_ERROR * scale, cells_per_error / FINE_GRID), COARSE_ERROR * scale)
    if cells_per_error / error > LARGEST_GRID:
        raise AccountingError(
            f"epsilon is about {scale:.2g}, for which its grid would need {cells_per_error / error:.2g} cells"
        )
    fine = [
        in_direction(PrivacyLoss(mechanism, direction), counts, delta, error)
        if any(mine.upper > both.lower for mine, both in zip(bounds, largest, strict=True))
        else bounds
        for direction, bounds in scouts.items()
    ]
    return [_larger(*bounds) for bounds in zip(*fine, strict=True)]


def _larger(first: EpsilonBounds, second: EpsilonBounds) -> EpsilonBounds:
    """Bounds of the larger of two numbers from bounds of each."""
    return EpsilonBounds(*(max(pair) for pair in zip(first, second, strict=True)))


def _cells_per_error(mechanism: Mechanism, steps: int, delta: float) -> float:
    """How many cells the grid has times the error in epsilon that it leaves."""
    return 2 * _loss_range(mechanism, steps, delta) / _cell_width(1.0, steps, delta)


def _cell_width(eps_error: float, steps: int, delta: float) -> float:
    """The width of cells that leaves `eps_error` in the composition (Gopi et al., theorem 5.5)."""
    return eps_error / math.sqrt(steps / 2 * math.log(12 / (DELTA_ERROR_SHARE * delta)))


def _loss_range(mechanism: Mechanism, steps: int, delta: float) -> float:
    """Where losses may be cut off at a cost within delta_error (Gopi et al., remark 5.6).

    The Renyi divergence of "remove" is at least that of "add" (Mironov et al. 2019, arXiv 1908.10530, theorem 5).
    """
    delta_error = DELTA_ERROR_SHARE * delta
    composed = renyi.upper_bound(mechanism, steps, delta_error / 4)
    single = renyi.upper_bound(mechanism, 1, delta_error / 8 / steps)
    return max(composed, single) + 3


def in_direction(loss: PrivacyLoss, counts: Sequence[int], delta: float, eps_error: float) -> list[EpsilonBounds]:
    """Bounds of +-`eps_error` around the estimate, at each of the increasing step counts."""
    from prv_accountant.composers import Fourier

    limit = max(_loss_range(loss.mechanism, counts[-1], delta), eps_error + 3)
    composer = Fourier([_discretise(loss, limit, _cell_width(eps_error, counts[-1], delta))])
    return [_epsilon(composer.compute_composition([count]), delta, eps_error) for count in counts]


def _discretise(loss: PrivacyLoss, limit: float, width: float) -> Any:
    """The loss on cells of `width` over about [-limit, limit], shifted so that its mean is exact.

    prv-accountant's own discretiser finds the mean by a quadrature that can miss the cells at ln(1 - sample_rate): the
    error, times the number of steps, moved epsilon by 0.006 in 27.7 upwards in one direction and would move it
    downwards in the other (docs/accounting.md). Hence this one, which takes the mean from the mechanism.
    """
    from prv_accountant.discrete_privacy_random_variable import DiscretePrivacyRandomVariable
    from prv_accountant.domain import Domain
    from scipy.fft import next_fast_len

    half = next_fast_len(math.ceil(limit / width) + 1, real=True)
    domain = Domain(-(half - 1) * width, half * width, 2 * half)
    centres = width * np.arange(1 - half, half + 1)
    masses = loss.masses(np.append(centres - width / 2, centres[-1] + width / 2))
    masses = (masses / masses.sum()).astype(np.longdouble)
    shift = loss.mean() - float(np.dot(centres, masses))
    if not abs(shift) < width / 2:
        raise AccountingError(f"the discrete loss has a mean off by {shift:.3g}, with cells of {width:.3g}")
    # Fourier transforms of extended precision: powers of thousands amplify their rounding.
    return DiscretePrivacyRandomVariable(masses, domain.shift_right(shift))


def _epsilon(composed: Any, delta: float, eps_error: float) -> EpsilonBounds:
    """Read epsilon off the composed loss; refuse one in which rounding is visible."""
    delta_error = DELTA_ERROR_SHARE * delta
    # A probability below zero can only be rounding, and that of all cells is of its order.
    rounding = -10 * float(composed.pmf[composed.pmf < 0].sum())
    if rounding > delta / 10:
        raise AccountingError(f"rounding errors of {rounding:.2g} in probability are not small beside {delta=:.3g}")
    lower, estimate, upper = composed.compute_epsilon(delta, delta_error + rounding, eps_error)
    return EpsilonBounds(lower, estimate, upper)
