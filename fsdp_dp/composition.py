"""What runs on the same rows cost together, where somebody sees the results of all: plain composition.

Numbers come from the runs' ledgers; a run without a ledger that holds has no cost that could be stated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fsdp_dp import accounting, tuning
from fsdp_dp.accounting import Mechanism
from fsdp_dp.config import AccountantName
from fsdp_dp.reporting.run import Run
from fsdp_dp.training.report import adjacency_in_words
from fsdp_dp.tuning import Trial

FORESEEN = (
    "It holds if which runs were made, with what noise and for how many releases, was settled before the first of them. "
    "Where what had been seen decided that, it is the reading of a privacy odometer: a filter (arXiv 2203.05481) would need "
    "its limit fixed before the first release."
)


def trial_of(run: Run) -> Trial:
    """The releases that a run committed to, as the accountant counts them."""
    if run.standing is None or run.privacy is None:
        raise ValueError(f"{run.name}: no cost can be stated. {run.verdict}. Leave the run out only if nobody saw it")
    if run.standing.seeded:
        raise ValueError(f"{run.name}: its seed was fixed, so there is no guarantee to compose")
    mechanism = Mechanism(run.noise_multiplier, accounting.row_rate(run.privacy), accounting.cap_of(run.privacy))
    return Trial(mechanism, accounting.row_releases(run.privacy, run.standing.accounted(run.releases)))


def cost(runs: Sequence[Run], delta: float | None) -> list[str]:
    """Plain composition of runs on one data set, line by line.

    Raises:
        ValueError: a run has no guarantee, or their rows or adjacency differ, so that no sum has a meaning.
    """
    trials = [trial_of(run) for run in runs]
    require_same("rows", [rows_of(run) for run in runs], runs)
    require_same("adjacency", [adjacency_in_words(privacy(run)) for run in runs], runs)
    if delta is None:
        delta = require_same("target_delta (give --delta)", [privacy(run).target_delta for run in runs], runs)
    accountants = {privacy(run).accountant for run in runs}
    accountant: AccountantName = accountants.pop() if len(accountants) == 1 else "prv"
    upper = tuning.composed_epsilon(trials, delta, accountant).upper
    return [
        *(f"{run.name}: {releases(run)}, epsilon = {bound(run):.6g} alone{at_delta(run, delta)}" for run in runs),
        f"together: epsilon <= {upper:.6g} at delta = {delta:.3g} ({adjacency_in_words(privacy(runs[0]))}; {runs[0].unit})",
        "This covers every release of these runs, all of them seen. It does not cover runs that are not named here, nor "
        "metrics: training losses, and held-out scores on private data.",
        FORESEEN,
        *(f"{run.name}: its budget was raised after releases had been made" for run in runs if extended(run)),
        *(f"{run.name}: nominal numerics, rounding is not bounded" for run in runs if nominal(run)),
    ]


def require_same(what: str, found: Sequence[Any], runs: Sequence[Run]) -> Any:
    """The one value that all runs have, or ValueError."""
    for value, run in zip(found, runs, strict=True):
        if value != found[0]:
            raise ValueError(
                f"{what} must be the same for all runs, found {found[0]!r} in {runs[0].name} and {value!r} in {run.name}: "
                "epsilons of different things do not add up"
            )
    return found[0]


def rows_of(run: Run) -> tuple[Any, ...]:
    return run.config["data"], run.config["model"].get("block_size"), privacy(run).dataset_size


def privacy(run: Run) -> Any:
    assert run.privacy is not None
    return run.privacy


def nominal(run: Run) -> bool:
    return bool(privacy(run).numerics == "nominal")


def extended(run: Run) -> bool:
    return run.standing is not None and run.standing.extended


def at_delta(run: Run, delta: float) -> str:
    """Which delta a run's own epsilon has, where it is not that of the sum."""
    own = privacy(run).target_delta
    return "" if own == delta else f" at its own delta = {own:.3g}"


def bound(run: Run) -> float:
    assert run.bounds is not None
    return run.bounds.upper


def releases(run: Run) -> str:
    return f"{run.releases} releases with σ = {run.noise_multiplier:.6g}"
