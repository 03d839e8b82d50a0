"""dp-accounting's privacy loss distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fsdp_dp.accountants import renyi
from fsdp_dp.accountants.mechanism import (
    DELTA_ERROR_SHARE,
    AccountingError,
    EpsilonBounds,
    Mechanism,
    MissingAccountantError,
)

# Rounding per release: its Fourier transforms are in double precision; 30 times what was measured.
PLD_ROUNDING = 1e-15
LARGEST_RELEASE = 2**18


def compose(mechanism: Mechanism, counts: Sequence[int], delta: float) -> list[EpsilonBounds]:
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

    scale = max(renyi.upper_bound(mechanism, counts[-1], delta), 1e-4)
    while True:
        # The error grows like steps * interval^2 / epsilon; this keeps it near a thousandth of epsilon.
        interval = min(max(scale * math.sqrt(5e-4 / counts[-1]), 1e-6), max(1e-2, 1e-5 * scale))
        interval = max(interval, _range(mechanism) / LARGEST_RELEASE)
        bounds = _at(mechanism, counts, delta, interval)
        # Where epsilon is small beside its Renyi bound, that made the cells too wide.
        finer = max(bounds[-1].upper, 1e-4)
        if finer > scale / 2 or interval <= max(1e-6, _range(mechanism) / LARGEST_RELEASE):
            return bounds
        scale = finer


def _at(mechanism: Mechanism, counts: Sequence[int], delta: float, interval: float) -> list[EpsilonBounds]:
    """Its bounds from losses rounded to multiples of `interval`."""
    release = _release(mechanism, interval)
    bounds = []
    for count in counts:
        rounding = max(DELTA_ERROR_SHARE * delta, PLD_ROUNDING * count)
        if rounding > delta / 2:
            raise AccountingError(f"rounding errors of {rounding:.2g} in probability are not small beside {delta=:.3g}")
        composed = release.self_compose(count, tail_mass_truncation=DELTA_ERROR_SHARE * delta / 10)
        estimate, upper = (composed.get_epsilon_for_delta(value) for value in (delta, delta - rounding))
        bounds.append(EpsilonBounds(0.0, estimate, upper))
    return bounds


def _range(mechanism: Mechanism) -> float:
    """How far apart the losses of one release lie."""
    sigma, q, cap = mechanism
    if cap is not None:  # where a draw is cut, a row may take another's place: a Gaussian of twice the sensitivity
        return 4 * (1 + 10 * sigma) / sigma**2
    lowest, highest = renyi.log_ratio(np.array([-10 * sigma, 1 + 10 * sigma]), sigma, q)
    return float(highest - lowest)


def _release(mechanism: Mechanism, interval: float) -> Any:
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
