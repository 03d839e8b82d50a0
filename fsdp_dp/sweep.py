"""`python -m fsdp_dp.sweep cost|draw|winner`: what it costs in privacy to choose hyper-parameters on private data.

`cost RUN...` adds up runs whose results somebody sees, a grid for example: plain composition. `draw` and `winner` are the
other way, that of arXiv 2110.03620: a secret random number of trials, drawn from one distribution, of which only the best
is released, at a cost that hardly grows with their number (`fsdp_dp.selection`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fsdp_dp import accounting, tuning
from fsdp_dp.accounting import AccountingError, Mechanism
from fsdp_dp.config import AccountantName
from fsdp_dp.reporting.run import Run, read_run
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
    mechanism = Mechanism(run.noise_multiplier, accounting._row_rate(run.privacy), accounting._cap(run.privacy))
    return Trial(mechanism, accounting._row_releases(run.privacy, run.standing.accounted(run.releases)))


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


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where no cost can be stated."""
    from fsdp_dp import selection  # which reads runs as this module does

    asked = parser().parse_args(arguments)
    try:
        if asked.command == "draw":
            lines = selection.draw(asked.choices, eta=asked.eta, mean=asked.mean, output=asked.output)
        elif asked.command == "winner":
            lines = selection.winner(asked.folder)
        else:
            lines = cost([read_run(path) for path in asked.runs], asked.delta)
    except (ValueError, AccountingError) as error:
        print(f"fsdp_dp.sweep: {error}", file=sys.stderr)
        return 1
    print(*lines, sep="\n")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fsdp_dp.sweep", description="What tuning costs in privacy.")
    commands = parser.add_subparsers(dest="command", required=True)
    together = commands.add_parser("cost", help="several runs together, all of them seen")
    together.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    together.add_argument("--delta", type=float, help="default: the runs' own")
    drawn = commands.add_parser("draw", help="list a secret random number of trials, one line of overrides each")
    drawn.add_argument("choices", nargs="+", metavar="NAME=VALUE,VALUE", help="an option and its values")
    drawn.add_argument(
        "--output", type=Path, default=Path("outputs/sweep"), help="a new folder, for the trials' folders"
    )
    drawn.add_argument("--mean", type=float, required=True, help="trials on average")
    drawn.add_argument("--eta", type=float, default=0.0, help="shape: 0 logarithmic, 1 geometric (default: 0)")
    best = commands.add_parser("winner", help="the best of the trials that `draw` listed, the others never seen")
    best.add_argument("folder", type=Path, metavar="FOLDER", help="the --output of `draw`")
    return parser


if __name__ == "__main__":
    sys.exit(main())
