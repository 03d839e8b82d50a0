"""The options that can change epsilon, checked once and then fixed.

`PrivacyConfig` is what the user promises and asks for; the engine, the loader and the accountant read it and nothing
else. Options that cannot change epsilon live elsewhere. This module imports no torch, so that a command line can refuse
a bad value before any process group starts.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

Sampling = Literal["poisson", "external_poisson", "shuffle"]
Clipping = Literal["flat", "block", "layer", "parameter"]
GroupBounds = Literal["uniform", "dimension"]
ClipFunction = Literal["abadi", "automatic", "normalized"]
Numerics = Literal["certified", "nominal"]
LossReduction = Literal["mean", "sum"]
AccountantName = Literal["prv", "pld", "rdp"]


@dataclass(frozen=True, kw_only=True)
class AdaptiveBounds:
    """Clipping bounds that follow a quantile of the norms, found privately (Andrew et al., arXiv 1905.03871; for several
    groups He et al., arXiv 2212.01539).

    - `target_quantile`: the share of rows that should not be clipped.
    - `learning_rate`: eta of the geometric update `R <- R exp(-eta (share - target_quantile))`, once a release.
    - `budget_fraction`: the share of the release's privacy that the estimate takes. The noise of the gradients grows by
      `1 / sqrt(1 - budget_fraction)` for it, so that epsilon stays that of `noise_multiplier`.
    - `floor`: no bound falls below this times its first value. Public; it must not be chosen from the data.

    Raises:
        ValueError: an option is out of range.
    """

    target_quantile: float = 0.5
    learning_rate: float = 0.2
    budget_fraction: float = 0.01
    floor: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("target_quantile", "budget_fraction"):
            require_number(f"adaptive_bounds.{name}", getattr(self, name), above=0.0, below=1.0)
        require_number("adaptive_bounds.learning_rate", self.learning_rate, above=0.0, at_most=1.0)
        require_number("adaptive_bounds.floor", self.floor, above=0.0, at_most=1.0)


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
    - `max_batch_size`: a cap on the rows of a logical batch, so that every step has the same shape; a larger draw is cut at
      random. Needs sampling="poisson" and accountant="pld", which has the cost (docs/accounting.md).
    - `clipping`: which parameters share a bound: all of them ("flat"), those of an FSDP unit ("block"), of a layer, each
      its own ("parameter"), or a mapping from patterns of parameter names (`*` as in file names, the first that fits
      counts) to names of groups.
    - `group_bounds`: K groups have bounds R_k with `sqrt(sum R_k^2) = max_grad_norm`: all equal ("uniform"), proportional
      to the square root of the group's elements ("dimension"), or a mapping from groups to bounds.
    - `clip_function`: how a row is scaled to its bound: "abadi" `min(1, R/n)`, "automatic" `R/(n + clip_stability)`
      (AUTO-S, arXiv 2206.07136), "normalized" `R/n`.
    - `adaptive_bounds`: let the bounds follow the norms, privately; `max_grad_norm` is then where they start.
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
    max_batch_size: int | None = None
    clipping: Clipping | Mapping[str, str] = "flat"
    group_bounds: GroupBounds | Mapping[str, float] = "uniform"
    clip_function: ClipFunction = "abadi"
    clip_stability: float = 0.01
    adaptive_bounds: AdaptiveBounds | None = None
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
        self._check_groups()
        self._check_batch_fits()
        self._check_cap()
        self._check_noise_or_budget()
        self._check_delta()

    @property
    def sample_rate(self) -> float:
        """The expected fraction of the data set in one logical batch."""
        return self.expected_batch_size / self.dataset_size

    @property
    def clipping_in_words(self) -> str:
        """What one row's gradient is held to, for reports."""
        start = "" if self.adaptive_bounds is None else " at the start"
        words = f"norm of a row's gradient over all parameters at most R = {self.max_grad_norm:g}{start}"
        if self.clipping != "flat":
            groups = self.clipping if isinstance(self.clipping, str) else "group of names"
            bounds = self.group_bounds if isinstance(self.group_bounds, str) else "given"
            words += f"; each {groups} to a bound of its own ({bounds}), squares adding up to R^2"
        if self.adaptive_bounds is not None:
            share = self.adaptive_bounds.budget_fraction
            words += f"; bounds adapt privately, for which {100 * share:g} % of each release's privacy is spent"
        return words if self.clip_function == "abadi" else f"{words}; {self.clip_function} clip function"

    def _check_choices(self) -> None:
        require_choice("sampling", self.sampling, get_args(Sampling))
        require_choice("clip_function", self.clip_function, get_args(ClipFunction))
        require_choice("numerics", self.numerics, get_args(Numerics))
        require_choice("loss_reduction", self.loss_reduction, get_args(LossReduction))
        require_choice("accountant", self.accountant, get_args(AccountantName))

    def _check_groups(self) -> None:
        require_groups("clipping", self.clipping)
        require_group_bounds("group_bounds", self.group_bounds)
        require_number("clip_stability", self.clip_stability, above=0.0)
        if self.adaptive_bounds is not None:
            if not isinstance(self.adaptive_bounds, AdaptiveBounds):
                raise ValueError(f"adaptive_bounds must be an AdaptiveBounds, found {_shown(self.adaptive_bounds)}.")
            if self.clip_function != "abadi":
                raise ValueError(
                    f"adaptive_bounds needs clip_function='abadi', found '{self.clip_function}', which scales every row to "
                    "the bound, so that no share of unclipped rows can be aimed at."
                )

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

    def _check_cap(self) -> None:
        if self.max_batch_size is None:
            return
        require_integer("max_batch_size", self.max_batch_size, at_least=self.expected_batch_size)
        if self.max_batch_size > self.dataset_size:
            raise ValueError(
                f"max_batch_size={self.max_batch_size} is more than dataset_size={self.dataset_size}: no draw is that large. "
                "Lower it, or leave it out."
            )
        if self.sampling != "poisson" or self.accountant != "pld":
            raise ValueError(
                "max_batch_size needs sampling='poisson' and accountant='pld' (the extra fsdp-dp[pld]), found "
                f"'{self.sampling}' and '{self.accountant}': cut draws are no Poisson draws, and no other accountant here "
                "knows what they cost. Set both, or leave max_batch_size out."
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


def require_groups(option: str, value: object) -> None:
    """Raise ValueError unless `value` is a word for a way of grouping, or a mapping of patterns to groups."""
    if not isinstance(value, Mapping):
        require_choice(option, value, get_args(Clipping))
    elif not value or not all(isinstance(x, str) for pair in value.items() for x in pair):
        raise ValueError(
            f"{option} must be a word, or a mapping from patterns of parameter names to names of groups, found "
            f"{value!r}. For example {{'*.attention.*': 'attention', '*': 'rest'}}"
        )


def require_group_bounds(option: str, value: object) -> None:
    """Raise ValueError unless `value` is a word for a way of dividing R, or a mapping of groups to bounds."""
    if not isinstance(value, Mapping):
        require_choice(option, value, get_args(GroupBounds))
        return
    for group, bound in value.items():
        require_number(f"{option}[{group!r}]", bound, above=0.0)


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
