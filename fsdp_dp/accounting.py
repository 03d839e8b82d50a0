"""Epsilon of a run of noised releases, and the noise that a budget asks for: upper bounds, never guesses.

A release is a Gaussian mechanism on a Poisson sample (docs/accounting.md). Three accountants bound its composition:
`prv` discretises the privacy loss and composes it with Fourier transforms (prv-accountant; Gopi, Lee, Wutschitz 2021,
arXiv 2106.02848), `pld` is dp-accounting's privacy loss distribution, `rdp` is Opacus's Renyi accountant. What cannot
be computed raises `AccountingError`. The accountants are in `accountants`; no torch there, nor here, and
each one's package is imported where it is used.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np

from fsdp_dp.accountants import gaussian, pld, prv, rdp, renyi
from fsdp_dp.accountants.calibration import CALIBRATION_SLACK, search
from fsdp_dp.accountants.mechanism import (
    SMALLEST_NOISE,
    AccountingError,
    Cap,
    EpsilonBounds,
    Mechanism,
    MissingAccountantError,
)
from fsdp_dp.config import AccountantName, PrivacyConfig, require_choice, require_integer, require_number

__all__ = [
    "CALIBRATION_SLACK", "SMALLEST_NOISE", "AccountingError", "Cap", "EpsilonBounds", "Mechanism", "MissingAccountantError",
    "calibrate_for", "calibrate_noise_multiplier", "cap_of", "epsilon", "epsilon_for", "epsilon_schedule", "row_rate",
    "row_releases", "schedule_for",
]  # fmt: skip

logger = logging.getLogger(__name__)


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
        return renyi.upper_bound(Mechanism(noise_multiplier, sample_rate), steps, delta)

    try:
        return search(upper, model, target_epsilon)
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
        sample_rate=row_rate(privacy),
        steps=[row_releases(privacy, count) for count in steps],
        delta=delta,
        accountant=privacy.accountant,
        cap=cap_of(privacy),
    )


def calibrate_for(privacy: PrivacyConfig) -> float:
    """The noise multiplier that `privacy` asks for: its own, or the one that meets its budget over its `steps`."""
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    assert privacy.target_epsilon is not None and privacy.steps is not None  # PrivacyConfig holds this
    return calibrate_noise_multiplier(
        target_epsilon=privacy.target_epsilon,
        sample_rate=row_rate(privacy),
        steps=row_releases(privacy, privacy.steps),
        delta=privacy.target_delta,
        accountant=privacy.accountant,
        cap=cap_of(privacy),
    )


def cap_of(privacy: PrivacyConfig) -> Cap | None:
    return None if privacy.max_batch_size is None else Cap(privacy.dataset_size, privacy.max_batch_size)


def _require_setting(sample_rate: float, delta: float, accountant: str, cap: Cap | None) -> None:
    require_number("sample_rate", sample_rate, above=0.0, at_most=1.0)
    require_number("delta", delta, above=0.0, below=1.0)
    require_choice("accountant", accountant, get_args(AccountantName))
    if cap is not None and accountant != "pld":
        raise ValueError(f"accountant must be 'pld' for draws that are cut to max_batch_size, found '{accountant}'")


def row_rate(privacy: PrivacyConfig) -> float:
    """How likely a row is to be in a release that may hold it; a shuffled order amplifies nothing."""
    return 1.0 if privacy.sampling == "shuffle" else privacy.sample_rate


def row_releases(privacy: PrivacyConfig, steps: int) -> int:
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
    composition = gaussian.compose if mechanism.sample_rate == 1 and accountant != "rdp" else _COMPOSITIONS[accountant]
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


_COMPOSITIONS: dict[str, Callable[[Mechanism, Sequence[int], float], list[EpsilonBounds]]] = {
    "prv": prv.compose,
    "pld": pld.compose,
    "rdp": rdp.compose,
}
