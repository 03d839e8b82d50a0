"""What is composed, what is found of it, and how it fails."""

from __future__ import annotations

from typing import NamedTuple

# What the accountant's own arithmetic may cost, as a share of delta (rule 10).
DELTA_ERROR_SHARE = 1e-3
# Noise multipliers beside these leave the range of the arithmetic.
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
