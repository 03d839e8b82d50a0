"""Opacus's Renyi accountant."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from fsdp_dp.accountants.mechanism import EpsilonBounds, Mechanism, MissingAccountantError


def compose(mechanism: Mechanism, counts: Sequence[int], delta: float) -> list[EpsilonBounds]:
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
