"""Epsilon of a run of noised releases, and the noise that a budget asks for: upper bounds, never guesses.

A release is a Gaussian mechanism on a Poisson sample (docs/accounting.md). Three accountants bound its composition:
`prv` discretises the privacy loss and composes it with Fourier transforms (prv-accountant; Gopi, Lee, Wutschitz 2021,
arXiv 2106.02848), `pld` is dp-accounting's privacy loss distribution, `rdp` is Opacus's Renyi accountant. What cannot
be computed raises `AccountingError`. No torch here; each accountant's package is imported where it is used.

Names: q is the sample rate, sigma the noise multiplier; the *loss* is ln(P/Q) at an outcome drawn from P, where P is
with the row and Q without it in the direction "remove", and the other way round in "add".
"""

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from fsdp_dp.config import AccountantName, PrivacyConfig, require_choice, require_integer, require_number

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

# What the accountant's own arithmetic may cost, as a share of delta (rule 10).
DELTA_ERROR_SHARE = 1e-3
# Half the width of the PRV bounds as a share of epsilon: wanted, and accepted where the grid would pass FINE_GRID cells.
FINE_ERROR, COARSE_ERROR = 2e-3, 2e-2
FINE_GRID, LARGEST_GRID = 2**19, 2**22
# The first PRV pass, which only has to say how large epsilon is and which direction matters.
SCOUT_ERROR = 5e-2
# Rounding of "pld" per release: its Fourier transforms are in double precision; 30 times what was measured.
PLD_ROUNDING = 1e-15
LARGEST_RELEASE = 2**18
# How far below the target calibration may stop.
CALIBRATION_SLACK = 3e-3
SMALLEST_NOISE, LARGEST_NOISE = 1e-2, 1e8


class AccountingError(RuntimeError):
    """No accountant that may be used here can bound epsilon for these parameters."""


class MissingAccountantError(AccountingError):
    """The package of the accountant is not installed, whatever the parameters."""


class EpsilonBounds(NamedTuple):
    """What is known of epsilon; `upper` is the one to report."""

    lower: float
    estimate: float
    upper: float


class Cap(NamedTuple):
    """A draw of more than `max_batch_size` of the `dataset_size` rows is cut to that many, chosen uniformly."""

    dataset_size: int
    max_batch_size: int


class Mechanism(NamedTuple):
    """One release: a Gaussian of `noise_multiplier` times the sensitivity, each row present with `sample_rate`."""

    noise_multiplier: float
    sample_rate: float
    cap: Cap | None = None


def epsilon(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: AccountantName = "prv",
    cap: Cap | None = None,
) -> EpsilonBounds:
    """Bound epsilon at `delta` of `steps` releases.

    **Formal guarantee**: releases that each add N(0, (noise_multiplier * R)^2 I) to a sum of contributions of norm at
    most R, over an independent Poisson sample of rate `sample_rate`, are together (upper, delta)-differentially
    private, for adding and for removing a row; each release may depend on the earlier ones. With a `cap`, adjacency is to
    replace a row by one that contributes nothing, and the dataset's size is public.

    `steps=0` gives zeros, `noise_multiplier=0` infinity, and nothing else does. `sample_rate=1` is exact except with
    "rdp". With "rdp" and "pld" nothing is known from below and `lower` is 0.

    Raises:
        ValueError: an argument is out of range.
        AccountingError: the accountant fails for these parameters, and the one it may fall back to as well.
    """
    return epsilon_schedule(
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        steps=[steps],
        delta=delta,
        accountant=accountant,
        cap=cap,
    )[0]


def epsilon_schedule(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: Sequence[int],
    delta: float,
    accountant: AccountantName = "prv",
    cap: Cap | None = None,
) -> list[EpsilonBounds]:
    """`epsilon` at each of the step counts, in their order, from one discretisation.

    The bounds at the largest count are those of `epsilon`; smaller counts get bounds as wide, in absolute terms.
    Each count costs a Fourier transform (tenths of a second with "prv"), so a long run lists some tens of counts.
    """
    require_number("noise_multiplier", noise_multiplier, at_least=0.0)
    _require_setting(sample_rate, delta, accountant, cap)
    for count in steps:
        require_integer("steps", count, at_least=0)
    counts = sorted({int(count) for count in steps if count > 0})
    bounds = {0: EpsilonBounds(0.0, 0.0, 0.0)}
    if noise_multiplier == 0:
        bounds |= dict.fromkeys(counts, EpsilonBounds(math.inf, math.inf, math.inf))
    elif counts:
        mechanism = Mechanism(float(noise_multiplier), float(sample_rate), cap)
        bounds |= zip(counts, _compose(mechanism, counts, float(delta), accountant), strict=True)
    return [bounds[int(count)] for count in steps]


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: AccountantName = "prv",
    cap: Cap | None = None,
) -> float:
    """The least noise, up to rounding upwards, whose `epsilon(...).upper` is at most `target_epsilon`.

    The result is always one for which `epsilon` was evaluated: its upper bound lies within `CALIBRATION_SLACK` (0.3 %)
    below the target.

    Raises:
        ValueError: an argument is out of range.
        AccountingError: no noise multiplier that the accountant can handle meets the target.
    """
    require_number("target_epsilon", target_epsilon, above=0.0)
    require_integer("steps", steps, at_least=1)
    _require_setting(sample_rate, delta, accountant, cap)

    def upper(noise_multiplier: float) -> float:
        return epsilon(
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            steps=steps,
            delta=delta,
            accountant=accountant,
            cap=cap,
        ).upper

    def model(noise_multiplier: float) -> float:
        return _renyi_bound(Mechanism(noise_multiplier, sample_rate), steps, delta)

    try:
        return _search(upper, model, target_epsilon)
    except MissingAccountantError:
        raise
    except AccountingError as failure:
        raise AccountingError(
            f"No noise multiplier was found for target_epsilon={target_epsilon} at sample_rate={sample_rate:.6g}, "
            f"steps={steps}, delta={delta:.3g} with accountant='{accountant}': {failure}. If the target is very small, "
            "lower steps or sample_rate, or raise it; if it is very large, or delta is, give noise_multiplier instead."
        ) from failure


def epsilon_for(privacy: PrivacyConfig, noise_multiplier: float, steps: int, delta: float) -> EpsilonBounds:
    """Bound epsilon of `steps` releases drawn as `privacy.sampling` says, by `privacy.accountant`."""
    return schedule_for(privacy, noise_multiplier, [steps], delta)[0]


def schedule_for(
    privacy: PrivacyConfig, noise_multiplier: float, steps: Sequence[int], delta: float
) -> list[EpsilonBounds]:
    """`epsilon_for` at each of the step counts, in their order, from one discretisation."""
    return epsilon_schedule(
        noise_multiplier=noise_multiplier,
        sample_rate=_row_rate(privacy),
        steps=[_row_releases(privacy, count) for count in steps],
        delta=delta,
        accountant=privacy.accountant,
        cap=_cap(privacy),
    )


def calibrate_for(privacy: PrivacyConfig) -> float:
    """The noise multiplier that `privacy` asks for: its own, or the one that meets its budget over its `steps`."""
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    assert privacy.target_epsilon is not None and privacy.steps is not None  # PrivacyConfig holds this
    return calibrate_noise_multiplier(
        target_epsilon=privacy.target_epsilon,
        sample_rate=_row_rate(privacy),
        steps=_row_releases(privacy, privacy.steps),
        delta=privacy.target_delta,
        accountant=privacy.accountant,
        cap=_cap(privacy),
    )


def _cap(privacy: PrivacyConfig) -> Cap | None:
    return None if privacy.max_batch_size is None else Cap(privacy.dataset_size, privacy.max_batch_size)


def _require_setting(sample_rate: float, delta: float, accountant: str, cap: Cap | None) -> None:
    require_number("sample_rate", sample_rate, above=0.0, at_most=1.0)
    require_number("delta", delta, above=0.0, below=1.0)
    require_choice("accountant", accountant, get_args(AccountantName))
    if cap is not None and accountant != "pld":
        raise ValueError(f"accountant must be 'pld' for draws that are cut to max_batch_size, found '{accountant}'")


def _row_rate(privacy: PrivacyConfig) -> float:
    """How likely a row is to be in a release that may hold it; a shuffled order amplifies nothing."""
    return 1.0 if privacy.sampling == "shuffle" else privacy.sample_rate


def _row_releases(privacy: PrivacyConfig, steps: int) -> int:
    """In how many of the first `steps` releases one row may be: all of them, or one for each epoch touched."""
    require_integer("steps", steps, at_least=0)
    if privacy.sampling != "shuffle":
        return steps
    steps_per_epoch = privacy.dataset_size // privacy.expected_batch_size
    return -(-steps // steps_per_epoch)


# Composition, with what to do when it fails


def _compose(
    mechanism: Mechanism, counts: Sequence[int], delta: float, accountant: AccountantName
) -> list[EpsilonBounds]:
    """Bounds for each of the increasing step counts, all finite, or an AccountingError that says what to try."""
    try:
        return _with(accountant, mechanism, counts, delta)
    except AccountingError as failure:
        found = (
            f"accountant='{accountant}' cannot bound epsilon for {_described(mechanism, counts[-1], delta)}: {failure}"
        )
        if isinstance(failure, MissingAccountantError):
            raise
        if accountant != "prv":
            raise AccountingError(f"{found}. {_advice(accountant)}") from failure
    try:
        bounds = _with("pld", mechanism, counts, delta)
    except AccountingError as failure:
        raise AccountingError(f"{found}; nor can 'pld': {failure}. {_advice(accountant)}") from failure
    logger.info("%s; the bounds are those of accountant='pld'", found)
    return bounds


def _with(accountant: AccountantName, mechanism: Mechanism, counts: Sequence[int], delta: float) -> list[EpsilonBounds]:
    """One accountant's bounds; whatever it raises, and whatever is not finite, becomes an AccountingError."""
    composition = _exact if mechanism.sample_rate == 1 and accountant != "rdp" else _COMPOSITIONS[accountant]
    try:
        # Overflow to infinity is expected far outside the range that matters, and looked for in what comes back.
        with np.errstate(all="ignore"):
            bounds = composition(mechanism, counts, delta)
    except (RuntimeError, ValueError, ArithmeticError, MemoryError, AssertionError) as failure:
        if isinstance(failure, AccountingError):
            raise
        raise AccountingError(f"{type(failure).__name__} ({failure})") from failure
    for lower, estimate, upper in bounds:
        if not all(math.isfinite(value) for value in (lower, estimate, upper)):
            raise AccountingError(f"it returned ({lower}, {estimate}, {upper})")
    return [EpsilonBounds(*(max(0.0, float(value)) for value in bound)) for bound in bounds]


def _described(mechanism: Mechanism, steps: int, delta: float) -> str:
    return (
        f"noise_multiplier={mechanism.noise_multiplier:.6g}, sample_rate={mechanism.sample_rate:.6g}, steps={steps}, "
        f"delta={delta:.3g}"
    )


def _advice(accountant: AccountantName) -> str:
    other = "accountant='prv'" if accountant == "rdp" else "accountant='rdp', whose bound is looser"
    return f"Use more noise, a larger delta or {other}."


# Without subsampling: exact


def _exact(mechanism: Mechanism, counts: Sequence[int], delta: float) -> list[EpsilonBounds]:
    """Gaussians compose to a Gaussian of mu = sqrt(steps) / noise_multiplier, whose curve is known in closed form."""
    return [_gaussian_epsilon(math.sqrt(count) / mechanism.noise_multiplier, delta) for count in counts]


def _gaussian_epsilon(mu: float, delta: float) -> EpsilonBounds:
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


# prv


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

    def masses(self, edges: "NDArray[Any]") -> "NDArray[Any]":
        """The probability of the loss in each cell between increasing `edges`."""
        if self.direction == "remove":
            return self._outcome_masses(self._outcome(edges))
        return self._outcome_masses(self._outcome(-edges[::-1]))[::-1]

    def mean(self) -> float:
        """The expected loss, by the trapezoidal rule, which converges exponentially here."""
        sigma, q, _ = self.mechanism
        x = np.linspace(-14 * sigma, 1 + 14 * sigma, _nodes(1 + 28 * sigma, sigma))
        log_ratio = _log_ratio(x, sigma, q)
        without = np.exp(-((x / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
        if self.direction == "add":
            return float(np.trapezoid(-log_ratio * without, x))
        shifted = np.exp(-(((x - 1) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
        return float(np.trapezoid(log_ratio * ((1 - q) * without + q * shifted), x))

    def _outcome(self, log_ratio: "NDArray[Any]") -> "NDArray[Any]":
        """The x at which r(x) is `log_ratio`; minus infinity where r is always more."""
        sigma, q, _ = self.mechanism
        scaled = np.expm1(log_ratio) / q
        near = np.log1p(np.maximum(scaled, -1.0))
        far = log_ratio - np.log(q) + np.log1p(-(1 - q) * np.exp(-log_ratio))
        return sigma**2 * np.where(log_ratio < 40, near, far) + 0.5

    def _outcome_masses(self, x: "NDArray[Any]") -> "NDArray[Any]":
        """The probability of each cell between increasing outcomes `x`, with the row or without it."""
        sigma, q, _ = self.mechanism
        without = _normal_masses(x / sigma)
        return without if self.direction == "add" else (1 - q) * without + q * _normal_masses((x - 1) / sigma)


def _normal_masses(edges: "NDArray[Any]") -> "NDArray[Any]":
    """The standard normal probability of each cell, by differences of the smaller tail."""
    from scipy.special import ndtr

    left, right = edges[:-1], edges[1:]
    return np.where(left > 0, ndtr(-left) - ndtr(-right), ndtr(right) - ndtr(left))


def _prv(mechanism: Mechanism, counts: Sequence[int], delta: float) -> list[EpsilonBounds]:
    """Both directions roughly, then finely those that may be the larger one at some step count."""
    if mechanism.noise_multiplier < SMALLEST_NOISE:
        raise AccountingError(f"noise multipliers below {SMALLEST_NOISE} leave the range of its arithmetic")
    cells_per_error = _cells_per_error(mechanism, counts[-1], delta)
    scout_error = max(SCOUT_ERROR * _renyi_bound(mechanism, counts[-1], delta), cells_per_error / FINE_GRID)
    scouts = {
        direction: _prv_direction(PrivacyLoss(mechanism, direction), counts, delta, scout_error)
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
        _prv_direction(PrivacyLoss(mechanism, direction), counts, delta, error)
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
    composed = _renyi_bound(mechanism, steps, delta_error / 4)
    single = _renyi_bound(mechanism, 1, delta_error / 8 / steps)
    return max(composed, single) + 3


def _prv_direction(loss: PrivacyLoss, counts: Sequence[int], delta: float, eps_error: float) -> list[EpsilonBounds]:
    """Bounds of +-`eps_error` around the estimate, at each of the increasing step counts."""
    from prv_accountant.composers import Fourier

    limit = max(_loss_range(loss.mechanism, counts[-1], delta), eps_error + 3)
    composer = Fourier([_discretise(loss, limit, _cell_width(eps_error, counts[-1], delta))])
    return [_prv_epsilon(composer.compute_composition([count]), delta, eps_error) for count in counts]


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


def _prv_epsilon(composed: Any, delta: float, eps_error: float) -> EpsilonBounds:
    """Read epsilon off the composed loss; refuse one in which rounding is visible."""
    delta_error = DELTA_ERROR_SHARE * delta
    # A probability below zero can only be rounding, and that of all cells is of its order.
    rounding = -10 * float(composed.pmf[composed.pmf < 0].sum())
    if rounding > delta / 10:
        raise AccountingError(f"rounding errors of {rounding:.2g} in probability are not small beside {delta=:.3g}")
    lower, estimate, upper = composed.compute_epsilon(delta, delta_error + rounding, eps_error)
    return EpsilonBounds(lower, estimate, upper)


# pld


def _pld(mechanism: Mechanism, counts: Sequence[int], delta: float) -> list[EpsilonBounds]:
    """Pessimistic connect-the-dots (arXiv 2207.04380): an upper bound in both directions, nothing from below.

    dp-accounting's optimistic variant errs by about steps * interval / 2, which at this interval is epsilon itself.
    """
    try:
        from dp_accounting.pld import privacy_loss_distribution  # noqa: F401
    except ImportError as failure:
        raise MissingAccountantError(
            "dp-accounting is not installed, and accountant='pld' needs it: pip install dp-accounting (the extra "
            "fsdp-dp[pld]), or choose accountant='prv' or accountant='rdp'"
        ) from failure

    scale = max(_renyi_bound(mechanism, counts[-1], delta), 1e-4)
    while True:
        # The error grows like steps * interval^2 / epsilon; this keeps it near a thousandth of epsilon.
        interval = min(max(scale * math.sqrt(5e-4 / counts[-1]), 1e-6), max(1e-2, 1e-5 * scale))
        interval = max(interval, _pld_range(mechanism) / LARGEST_RELEASE)
        bounds = _pld_at(mechanism, counts, delta, interval)
        # Where epsilon is small beside its Renyi bound, that made the cells too wide.
        finer = max(bounds[-1].upper, 1e-4)
        if finer > scale / 2 or interval <= max(1e-6, _pld_range(mechanism) / LARGEST_RELEASE):
            return bounds
        scale = finer


def _pld_at(mechanism: Mechanism, counts: Sequence[int], delta: float, interval: float) -> list[EpsilonBounds]:
    """Its bounds from losses rounded to multiples of `interval`."""
    release = _pld_release(mechanism, interval)
    bounds = []
    for count in counts:
        rounding = max(DELTA_ERROR_SHARE * delta, PLD_ROUNDING * count)
        if rounding > delta / 2:
            raise AccountingError(f"rounding errors of {rounding:.2g} in probability are not small beside {delta=:.3g}")
        composed = release.self_compose(count, tail_mass_truncation=DELTA_ERROR_SHARE * delta / 10)
        estimate, upper = (composed.get_epsilon_for_delta(value) for value in (delta, delta - rounding))
        bounds.append(EpsilonBounds(0.0, estimate, upper))
    return bounds


def _pld_range(mechanism: Mechanism) -> float:
    """How far apart the losses of one release lie."""
    sigma, q, cap = mechanism
    if cap is not None:  # where a draw is cut, a row may take another's place: a Gaussian of twice the sensitivity
        return 4 * (1 + 10 * sigma) / sigma**2
    lowest, highest = _log_ratio(np.array([-10 * sigma, 1 + 10 * sigma]), sigma, q)
    return float(highest - lowest)


def _pld_release(mechanism: Mechanism, interval: float) -> Any:
    """The privacy loss distribution of one release; of cut draws after arXiv 2508.15089."""
    from dp_accounting.pld import privacy_loss_distribution as pld
    from dp_accounting.privacy_accountant import NeighboringRelation

    sigma, q, cap = mechanism
    if cap is None:
        return pld.from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=interval)
    return pld.from_truncated_subsampled_gaussian_mechanism(
        cap.dataset_size,
        q,
        cap.max_batch_size,
        sigma,
        value_discretization_interval=interval,
        neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,
    )


# rdp


def _rdp(mechanism: Mechanism, counts: Sequence[int], delta: float) -> list[EpsilonBounds]:
    """Opacus's Renyi accountant, with larger orders than its default too; the bound is also the estimate."""
    with warnings.catch_warnings():
        # The import's deprecations, and "optimal order is the largest": the bound holds there, only looser.
        warnings.simplefilter("ignore")
        try:
            from opacus.accountants import RDPAccountant
        except ImportError as failure:
            raise MissingAccountantError(
                "opacus is not installed, and accountant='rdp' needs it: pip install opacus"
            ) from failure
        # Small epsilons need them; beyond 1024 its binomials overflow.
        orders = [*RDPAccountant.DEFAULT_ALPHAS, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024]
        bounds = []
        for count in counts:
            accountant = RDPAccountant()
            accountant.history = [(mechanism.noise_multiplier, mechanism.sample_rate, count)]
            upper = float(accountant.get_epsilon(delta, alphas=orders))
            bounds.append(EpsilonBounds(0.0, upper, upper))
    return bounds


def _renyi_bound(mechanism: Mechanism, steps: int, delta: float) -> float:
    """A cheap upper bound from Renyi divergences, for the size of grids and for first guesses.

    Conversion: Balle et al. 2020 (arXiv 1905.09982), theorem 21.
    """
    bounds = (
        steps * log_moment / (order - 1) + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        for order, log_moment in _log_moments(mechanism)
    )
    return max(0.0, min(bounds))


@lru_cache(maxsize=256)
def _log_moments(mechanism: Mechanism) -> list[tuple[float, float]]:
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
    x = np.linspace(-14 * sigma, order + 14 * sigma, _nodes(span, sigma))
    log_density = -((x / sigma) ** 2) / 2 - math.log(sigma * math.sqrt(2 * math.pi))
    return float(logsumexp(log_density + order * _log_ratio(x, sigma, q))) + math.log(x[1] - x[0])


def _log_moment_by_sum(mechanism: Mechanism, order: int) -> float:
    """The binomial expansion of integer orders (Mironov et al. 2019, arXiv 1908.10530, section 3.3)."""
    from scipy.special import gammaln, logsumexp, xlog1py, xlogy

    sigma, q, _ = mechanism
    k = np.arange(order + 1)
    log_binomial = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    return float(logsumexp(log_binomial + xlog1py(order - k, -q) + xlogy(k, q) + k * (k - 1.0) / (2 * sigma**2)))


def _log_ratio(x: "NDArray[Any]", sigma: float, q: float) -> "NDArray[Any]":
    """r(x) = ln(with/without), of `PrivacyLoss`."""
    return np.logaddexp(np.log1p(-q), np.log(q) + (2 * x - 1) / (2 * sigma**2))


def _nodes(span: float, sigma: float) -> int:
    """How many nodes the trapezoidal rule needs: it converges exponentially in both of these scales of r and of x."""
    return math.ceil(span / min(sigma / 50, sigma**2 / 4))


_COMPOSITIONS: dict[str, Callable[[Mechanism, Sequence[int], float], list[EpsilonBounds]]] = {
    "prv": _prv,
    "pld": _pld,
    "rdp": _rdp,
}


# Calibration


def _search(upper: Callable[[float], float], model: Callable[[float], float], target: float) -> float:
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
