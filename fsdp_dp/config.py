"""The options that can change epsilon, checked once and then fixed.

`PrivacyConfig` is what the user promises and asks for; the engine, the loader and the accountant read it and nothing
else. Options that cannot change epsilon live elsewhere. This module imports no torch, so that a command line can refuse
a bad value before any process group starts.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

Sampling = Literal["poisson", "external_poisson", "shuffle"]
Clipping = Literal["flat"]
ClipFunction = Literal["abadi"]
Numerics = Literal["certified", "nominal"]
LossReduction = Literal["mean", "sum"]
AccountantName = Literal["prv", "pld", "rdp"]


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """What is asked of private training: bound, noise or budget, batch, data set.

    The unit is one row of the data set; adjacency is to add or remove one row (`sampling="shuffle"`: to zero one out).

    - `max_grad_norm`: R, the bound on the norm of one row's contribution to a release, over all trainable parameters.
    - `noise_multiplier` or `target_epsilon`, exactly one. The noise has standard deviation `noise_multiplier * R`; zero
      is for debugging and means that epsilon is infinite. `target_epsilon` needs `steps`, since noise is calibrated
      once, for a fixed number of releases.
    - `expected_batch_size`: rows of one logical batch in expectation, over all ranks; also the divisor of the sum.
    - `dataset_size`: rows of the data set, `len(dataset)`.
    - `target_delta`: required; `1 / (10 * dataset_size)` is a usual choice.
    - `steps`: the number of releases that the run commits to; None leaves it open.
    - `sampling`: "poisson" draws through the engine's loader; "external_poisson" is the user's word that batches are
      drawn so; "shuffle" visits each row at most once an epoch and is accounted without amplification.
    - `clipping`, `clip_function`: which parameters share a bound, and how a row is scaled to it.
    - `numerics`: "certified" bounds each contribution as rounded; "nominal" is the field's practice, for comparison.
    - `loss_reduction`: how the loss reduces the rows of the local microbatch.
    - `accountant`: "prv", "pld" (needs dp-accounting) or "rdp" (needs opacus; looser).
    - `seed`: None takes keys from the operating system; a number is for tests, and then there is no guarantee.

    Raises:
        ValueError: an option is missing, of the wrong kind or out of range; the message names it and what is allowed.

    Warns:
        UserWarning: `target_delta` is not below `1 / dataset_size`.
    """

    max_grad_norm: float
    expected_batch_size: int
    dataset_size: int
    target_delta: float = None  # type: ignore[assignment]  # a sentinel, so that its absence gets our own message
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    steps: int | None = None
    sampling: Sampling = "poisson"
    clipping: Clipping = "flat"
    clip_function: ClipFunction = "abadi"
    numerics: Numerics = "certified"
    loss_reduction: LossReduction = "mean"
    accountant: AccountantName = "prv"
    seed: int | None = None

    def __post_init__(self) -> None:
        require_number("max_grad_norm", self.max_grad_norm, above=0.0)
        require_integer("expected_batch_size", self.expected_batch_size, at_least=1)
        require_integer("dataset_size", self.dataset_size, at_least=1)
        if self.steps is not None:
            require_integer("steps", self.steps, at_least=1)
        if self.seed is not None:
            require_integer("seed", self.seed, at_least=0)
        self._check_choices()
        self._check_batch_fits()
        self._check_noise_or_budget()
        self._check_delta()

    @property
    def sample_rate(self) -> float:
        """The expected fraction of the data set in one logical batch."""
        return self.expected_batch_size / self.dataset_size

    def _check_choices(self) -> None:
        require_choice("sampling", self.sampling, get_args(Sampling))
        require_choice("clipping", self.clipping, get_args(Clipping))
        require_choice("clip_function", self.clip_function, get_args(ClipFunction))
        require_choice("numerics", self.numerics, get_args(Numerics))
        require_choice("loss_reduction", self.loss_reduction, get_args(LossReduction))
        require_choice("accountant", self.accountant, get_args(AccountantName))

    def _check_batch_fits(self) -> None:
        if self.expected_batch_size > self.dataset_size:
            reason = (
                "an epoch would hold no whole batch" if self.sampling == "shuffle" else "a row is drawn at most once"
            )
            raise ValueError(
                f"expected_batch_size={self.expected_batch_size} is more than dataset_size={self.dataset_size}: with "
                f"sampling='{self.sampling}' {reason}. Lower expected_batch_size, which counts the rows of one logical "
                "batch over all ranks, or correct dataset_size."
            )

    def _check_noise_or_budget(self) -> None:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            found = "neither" if self.noise_multiplier is None else "both"
            raise ValueError(
                f"Exactly one of noise_multiplier and target_epsilon is needed, found {found}. Give target_epsilon and "
                "steps to have the noise calibrated, or noise_multiplier to set it yourself."
            )
        if self.noise_multiplier is not None:
            require_number("noise_multiplier", self.noise_multiplier, at_least=0.0)
            return
        require_number("target_epsilon", self.target_epsilon, above=0.0)
        if self.steps is None:
            raise ValueError(
                f"target_epsilon={self.target_epsilon} needs steps, found None: noise is calibrated once, for a fixed "
                "number of releases. Give steps=<optimizer steps of the whole run>, or give noise_multiplier instead."
            )

    def _check_delta(self) -> None:
        advice = f"1/(10*dataset_size) = {1 / (10 * self.dataset_size):.3g} is a usual choice"
        if self.target_delta is None:
            raise ValueError(f"target_delta is required, found nothing. Give a number in (0, 1); {advice}.")
        require_number("target_delta", self.target_delta, above=0.0, below=1.0)
        if self.target_delta >= 1 / self.dataset_size:
            # Levels up to the caller: this method, __post_init__, the generated __init__.
            warnings.warn(
                f"target_delta={self.target_delta} is not below 1/dataset_size = {1 / self.dataset_size:.3g}: a "
                f"mechanism that publishes one row at random would pass. Lower it; {advice}.",
                UserWarning,
                stacklevel=4,
            )


def require_number(
    option: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> None:
    """Raise ValueError unless `value` is a finite real number within the bounds; bools and strings are refused."""
    limits = [
        f"{word} {limit}"
        for word, limit in (("above", above), ("at least", at_least), ("below", below), ("at most", at_most))
        if math.isfinite(limit)
    ]
    if not isinstance(value, Real) or isinstance(value, bool) or not _within(value, above, at_least, below, at_most):
        raise ValueError(f"{option} must be a finite number {' and '.join(limits)}, found {_shown(value)}.")


def require_integer(option: str, value: object, *, at_least: int) -> None:
    """Raise ValueError unless `value` is an integer of at least `at_least`; bools, floats and strings are refused."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{option} must be an integer of at least {at_least}, found {_shown(value)}.")


def require_choice(option: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of the `allowed` strings."""
    if not isinstance(value, str) or value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{option} must be one of {choices}, found {_shown(value)}.")


def _within(value: Real, above: float, at_least: float, below: float, at_most: float) -> bool:
    try:
        number = float(value)
    except OverflowError:
        return False
    return math.isfinite(number) and above < number < below and at_least <= number <= at_most


def _shown(value: object) -> str:
    """The value as found, with its type where that is what may be wrong."""
    return f"{value!r} ({type(value).__name__})"
