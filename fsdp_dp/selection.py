"""`draw` and `winner` of `fsdp_dp.sweep`: release the best of a secret, random number of trials, and nothing of the others.

Theorem 2 of arXiv 2110.03620 needs more than its formula: `draw` writes down what was drawn, once, and `winner` reads the
numbers from there, looks at every trial that was drawn, and chooses. What no program can see, it prints as terms.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fsdp_dp import tuning
from fsdp_dp.composition import bound, nominal, privacy, releases, require_same, rows_of, trial_of
from fsdp_dp.models.objective import ACCURACY, SCORES, Score
from fsdp_dp.reporting.run import Run, read_run
from fsdp_dp.training.metrics import series
from fsdp_dp.training.report import adjacency_in_words
from fsdp_dp.training.run_folder import CONFIG_FILE
from fsdp_dp.tuning import Trial

DRAW_FILE = "draw.json"
# What may differ from trial to trial: nothing here changes the noise multiplier, the draws, their number or the rows.
VARIED = ("optimizer", "clipping", "precision", "sharding", "privacy.max_grad_norm", "microbatch_size", "seed", "model")
NOT_VARIED = ("model", "model.block_size")  # the row, which is the unit; choosing a whole model changes it too
TERMS = """It holds if:
- the trials were drawn by `draw`, once, and their number stays secret: drawing again until it suits chooses it;
- each trial was trained with the options that `draw` listed for it, and all others alike;
- the best was chosen by its score on held-out data. Those data are not protected: not by this epsilon, nor by any other;
- nothing of the other trials is seen by anybody: no weights, losses, curves, names or times. Delete their folders, what they
  printed, and the list of the draw;
- of the best, its weights and that score are released. Its training losses, norms and times are not covered, as ever."""


class Drawn(NamedTuple):
    """What `draw` drew: the distribution of the number of trials, and each trial's folder and overrides."""

    eta: float
    mean: float
    trials: Mapping[str, str]


def draw(choices: Sequence[str], *, eta: float, mean: float, output: Path) -> list[str]:
    """Overrides of fsdp_dp.train, one line for each trial: a secret number of independent, uniform draws.

    Folders have random names: a number would say something of how many there are.

    Raises:
        ValueError: an option would change what a trial costs, or what a row is; or `output` is in use.
    """
    source = secrets.SystemRandom()
    options = [choice_of(choice) for choice in choices]
    number = tuning.draw_number(eta=eta, gamma=tuning.gamma_for(mean, eta=eta), source=source)
    trials = {
        secrets.token_hex(8): " ".join(f"{name}={source.choice(values)}" for name, values in options)
        for _ in range(number)
    }
    write_draw(Drawn(eta, mean, trials), output)
    return [f"{trial} output_dir={output}/{name}" for name, trial in trials.items()]


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
    if values != "".join(values.split()):
        raise ValueError(f"a value must hold no white space, which ends an override, found {choice!r}")
    return name, values.split(",")


def write_draw(drawn: Drawn, folder: Path) -> None:
    """Write what was drawn, for its owner alone; ValueError where the folder holds anything, another draw for example."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty: trials of one draw must not be mixed with others, and to draw again for a sweep that "
            "has begun is to choose its number. Go on with the trials that were listed, or name another --output"
        )
    with os.fdopen(os.open(folder / DRAW_FILE, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        json.dump(drawn._asdict(), file, indent=1)


def read_draw(folder: Path) -> Drawn:
    """What was drawn. Raises ValueError where nothing was."""
    try:
        drawn = Drawn(**json.loads((folder / DRAW_FILE).read_text(encoding="utf-8")))
        tuning.gamma_for(drawn.mean, eta=drawn.eta)
        if not drawn.trials:
            raise ValueError("it lists no trial")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{folder} is not the folder of a sweep that `draw` drew: {error}. Of runs that were chosen in any other way, "
            "`cost` says what they cost together"
        ) from error
    return drawn


def winner(folder: Path) -> list[str]:
    """The best of the trials that were drawn in `folder`, and what it costs to release it, line by line.

    Nothing of the other trials is in it. An error may name one, and is not to be published either.

    Raises:
        ValueError: a trial is missing, did not end, has no guarantee or costs something else; or there are others.
    """
    drawn = read_draw(folder)
    check_complete(folder, drawn)
    runs = [read_run(folder / name) for name in sorted(drawn.trials)]
    trial = common_trial(runs)
    best, score = chosen(runs)
    delta, gamma = privacy(best).target_delta, tuning.gamma_for(drawn.mean, eta=drawn.eta)
    upper = tuning.selection_epsilon(trial, delta, eta=drawn.eta, gamma=gamma)
    return [
        f"the best by its held-out {score.title} is {folder / best.name}",
        f"{best.name}: {releases(best)}, epsilon = {bound(best):.6g} alone",
        f"as the best of {drawn.mean:g} trials on average (eta = {drawn.eta:g}): epsilon <= {upper:.6g} at delta = "
        f"{delta:.3g} ({adjacency_in_words(privacy(best))}; {best.unit}; arXiv 2110.03620, theorem 2)",
        *([f"{best.name}: nominal numerics, rounding is not bounded"] if any(map(nominal, runs)) else []),
        TERMS,
    ]


def check_complete(folder: Path, drawn: Drawn) -> None:
    """Raise ValueError unless the runs in the folder are those that were drawn."""
    there = {path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}")}
    for names, what in ((drawn.trials.keys() - there, "did not run"), (there - drawn.trials.keys(), "was not drawn")):
        if names:
            raise ValueError(
                f"{folder / min(names)} {what}: theorem 2 is about the trials that were drawn, all of them"
            )


def common_trial(runs: Sequence[Run]) -> Trial:
    """What every one of the runs costs at most, as trials of one sweep.

    Raises:
        ValueError: one has no guarantee, did not end, or was trained with other options than the rest.
    """
    trials = [trial_of(run) for run in runs]
    for run in runs:
        assert run.standing is not None
        if run.standing.budget is None or run.standing.extended:
            raise ValueError(f"{run.name}: its number of releases was not fixed before it began, as theorem 2 needs")
        if run.standing.running or run.standing.counted < run.standing.budget:
            raise ValueError(
                f"{run.name} did not run to its end: go on with it by resume=true; theorem 2 needs all trials"
            )
    require_same("rows", [rows_of(run) for run in runs], runs)
    require_same("options that do not vary", [fixed_options(run) for run in runs], runs)
    require_same("releases", [(trial.mechanism[1:], trial.releases) for trial in trials], runs)
    # Calibrated in each run for itself: they may differ in the last digits.
    return min(trials, key=lambda trial: trial.mechanism.noise_multiplier)


def fixed_options(run: Run) -> dict[str, Any]:
    """What trials must have alike, apart from what `trial_of` and `rows_of` say."""
    found = privacy(run)
    names = ("target_delta", "sampling", "expected_batch_size", "steps", "max_batch_size", "numerics")
    return {name: getattr(found, name) for name in names}


def chosen(runs: Sequence[Run]) -> tuple[Run, Score]:
    """The run with the best held-out score at its end, and that score; what is no number loses."""
    for score in SCORES:
        found = [last_score(run, score) for run in runs]
        if all(value is None for value in found):
            continue
        for value, run in zip(found, runs, strict=True):
            if value is None:
                raise ValueError(
                    f"{run.name} has no held-out {score.title} at its end: theorem 2 needs one of every trial"
                )
        worst = -math.inf if score is ACCURACY else math.inf
        values = [worst if value is None or math.isnan(value) else value for value in found]
        best = max(values) if score is ACCURACY else min(values)
        return runs[values.index(best)], score
    raise ValueError(
        "no trial has a held-out score at its end: train them with diagnostics=true, and let nobody see it"
    )


def last_score(run: Run, score: Score) -> float | None:
    """The held-out score after the last release."""
    steps, values = series(run.records, f"held_out_{score.name}")
    return values[-1] if steps and steps[-1] == privacy(run).steps else None
