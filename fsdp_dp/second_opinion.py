"""What is said about ε besides ε: another accountant's opinion at the end of a run, and what a cap on draws costs.

Two accountants that share no arithmetic must not contradict each other: `prv` composes a discretised loss whose mean is
exact, within bounds on both sides; `pld` connects dots above the true curve. No torch here.
"""

from __future__ import annotations

from fsdp_dp import accounting
from fsdp_dp.accounting import AccountingError, EpsilonBounds
from fsdp_dp.config import PrivacyConfig

# How far above the truth the pessimistic estimate of "pld" may lie: a few thousandths were measured.
PLD_LOOSENESS = 2e-2


def cross_check(privacy: PrivacyConfig, noise_multiplier: float, steps: int) -> str:
    """Compare "prv" and "pld" on a whole run; what came of it, in a line.

    Raises:
        AccountingError: they contradict each other beyond their bounds, so that one of them is wrong.
    """
    if privacy.accountant == "rdp" or privacy.max_batch_size is not None or noise_multiplier == 0:
        return "epsilon not cross-checked: only accountants 'prv' and 'pld' can be compared, on draws that are not cut"
    if accounting.row_rate(privacy) == 1:
        return "epsilon not cross-checked: without sampling it is a formula, and both accountants are that"
    try:
        prv, pld = (
            accounting.epsilon(
                noise_multiplier=noise_multiplier,
                sample_rate=accounting.row_rate(privacy),
                steps=accounting.row_releases(privacy, steps),
                delta=privacy.target_delta,
                accountant=accountant,
            )
            for accountant in ("prv", "pld")
        )
    except AccountingError as failure:
        return f"epsilon not cross-checked: {failure}"
    if prv == pld:
        return "epsilon not cross-checked: 'prv' cannot bound it, so that 'pld' would be compared with itself"
    return compared(prv, pld)


def compared(prv: EpsilonBounds, pld: EpsilonBounds) -> str:
    """Raises AccountingError if no epsilon fits the bounds of both."""
    if pld.upper < prv.lower or pld.estimate > prv.upper * (1 + PLD_LOOSENESS):
        raise AccountingError(
            f"The accountants contradict each other: 'prv' puts epsilon between {prv.lower:.6g} and {prv.upper:.6g}, 'pld' "
            f"at {pld.estimate:.6g} and at most {pld.upper:.6g}. One of them is wrong: report neither, and compare the "
            "versions of prv-accountant and dp-accounting with constraints.txt"
        )
    return f"epsilon cross-checked: prv {prv.lower:.4g} to {prv.upper:.4g}, pld at most {pld.upper:.4g}"


def cost_of_cap(privacy: PrivacyConfig, noise_multiplier: float, steps: int) -> str:
    """What cutting draws at `max_batch_size` costs, in a line; a cap that is far above the mean costs nearly nothing."""
    from scipy.stats import binom

    assert privacy.max_batch_size is not None
    capped = accounting.epsilon_for(privacy, noise_multiplier, steps, privacy.target_delta).upper
    free = accounting.epsilon(
        noise_multiplier=noise_multiplier,
        sample_rate=privacy.sample_rate,
        steps=steps,
        delta=privacy.target_delta,
        accountant="pld",
    ).upper
    cut = binom.sf(privacy.max_batch_size, privacy.dataset_size, privacy.sample_rate)
    return (
        f"every step has the same shape: at most {privacy.max_batch_size} rows; a draw is cut with probability {cut:.2g}; "
        f"epsilon {capped:.4g} (zeroing out one row), where the same noise on uncut draws has {free:.4g}"
    )
