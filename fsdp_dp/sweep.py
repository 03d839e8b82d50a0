"""`python -m fsdp_dp.sweep cost|draw|winner`: what it costs in privacy to choose hyper-parameters on private data.

`cost RUN...` adds up runs whose results somebody sees, a grid for example: plain composition. `draw` and `winner` are the
other way, that of arXiv 2110.03620: a secret random number of trials, drawn from one distribution, of which only the best
is released, at a cost that hardly grows with their number. `draw` refuses choices for which that does not hold.
"""

from __future__ import annotations

import argparse
import secrets
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

# What may differ from trial to trial: nothing here changes the noise multiplier, the draws, their number or the rows.
VARIED = ("optimizer", "clipping", "precision", "sharding", "privacy.max_grad_norm", "microbatch_size", "seed", "model")
NOT_VARIED = ("model", "model.block_size")  # the row, which is the unit; choosing a whole model changes it too
TERMS = """It holds if:
- the number of trials was drawn by `draw` with these numbers, was not changed afterwards, and stays secret;
- all trials that `draw` listed, and no others, ran to their end, with the privacy options, rows, batch and steps of this one;
- the best was chosen by its score on held-out data. Those data are not protected: not by this epsilon, nor by any other;
- nothing of the other trials is seen by anybody: no weights, losses, curves or times. Delete their folders."""


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
        *(f"{run.name}: {releases(run)}, epsilon = {bound(run):.6g} alone" for run in runs),
        f"together: epsilon <= {upper:.6g} at delta = {delta:.3g} ({adjacency_in_words(privacy(runs[0]))}; {runs[0].unit})",
        "This covers every release of these runs, all of them seen. It does not cover runs that are not named here, nor "
        "metrics: training losses, and held-out scores on private data.",
        *(f"{run.name}: nominal numerics, rounding is not bounded" for run in runs if nominal(run)),
    ]


def winner(run: Run, *, eta: float, mean: float) -> list[str]:
    """What it costs to release the best of the trials that `draw` listed, line by line.

    Raises:
        ValueError: the run has no guarantee, or no budget that was fixed before it began.
    """
    trial = trial_of(run)
    assert run.standing is not None
    if run.standing.budget is None or run.standing.extended:
        raise ValueError(f"{run.name}: its number of releases was not fixed before it began, as theorem 2 needs")
    delta = privacy(run).target_delta
    upper = tuning.selection_epsilon(trial, delta, eta=eta, gamma=tuning.gamma_for(mean, eta=eta))
    return [
        f"{run.name}: {releases(run)}, epsilon = {bound(run):.6g} alone",
        f"as the best of {mean:g} trials on average (eta = {eta:g}): epsilon <= {upper:.6g} at delta = {delta:.3g} "
        "(arXiv 2110.03620, theorem 2)",
        *([f"{run.name}: nominal numerics, rounding is not bounded"] if nominal(run) else []),
        TERMS,
    ]


def draw(choices: Sequence[str], *, eta: float, mean: float, output: str) -> list[str]:
    """Overrides of fsdp_dp.train, one line for each trial: a secret number of independent, uniform draws.

    Raises:
        ValueError: an option would change what a trial costs, or what a row is.
    """
    source = secrets.SystemRandom()
    options = [choice_of(choice) for choice in choices]
    number = tuning.draw_number(eta=eta, gamma=tuning.gamma_for(mean, eta=eta), source=source)
    return [
        " ".join([*(f"{name}={source.choice(values)}" for name, values in options), f"output_dir={output}/{trial}"])
        for trial in range(number)
    ]


def choice_of(choice: str) -> tuple[str, list[str]]:
    """`name=a,b,c` taken apart."""
    name, _, values = choice.partition("=")
    if name in NOT_VARIED or not (name in VARIED or name.split(".")[0] in VARIED):
        raise ValueError(
            f"{name} must not vary between trials: theorem 2 bounds trials of one cost, on one kind of row. Vary "
            f"{', '.join(VARIED[:-1])} or model.<option> (not model.block_size), and give {name} to every trial alike"
        )
    if not values:
        raise ValueError(f"a choice is written name=value,value,..., found {choice!r}")
    return name, values.split(",")


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


def bound(run: Run) -> float:
    assert run.bounds is not None
    return run.bounds.upper


def releases(run: Run) -> str:
    return f"{run.releases} releases with σ = {run.noise_multiplier:.6g}"


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where no cost can be stated."""
    asked = parser().parse_args(arguments)
    try:
        if asked.command == "draw":
            lines = draw(asked.choices, eta=asked.eta, mean=asked.mean, output=asked.output)
        elif asked.command == "winner":
            lines = winner(read_run(asked.run), eta=asked.eta, mean=asked.mean)
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
    drawn.add_argument("--output", default="outputs/sweep", help="the folder of the trials' folders")
    best = commands.add_parser("winner", help="the best of the trials that `draw` listed, the others never seen")
    best.add_argument("run", type=Path, metavar="RUN")
    for command in (drawn, best):
        command.add_argument("--mean", type=float, required=True, help="trials on average")
        command.add_argument("--eta", type=float, default=0.0, help="shape: 0 logarithmic, 1 geometric (default: 0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
