"""report.md: what was trained, what is guaranteed, under which assumptions, and what is not guaranteed."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fsdp_dp.adaptive_bounds import split_noise
from fsdp_dp.config import PrivacyConfig
from fsdp_dp.data.config import DataConfig
from fsdp_dp.data.corpus import Corpus
from fsdp_dp.ledger import EXTENDED
from fsdp_dp.models.config import ModelConfig
from fsdp_dp.standing import Standing
from fsdp_dp.training.budget import Budget
from fsdp_dp.training.schema import TrainConfig

NOT_PRIVATE = "not private"
DIAGNOSTICS_OFF = (
    "This run wrote down no loss, norm, throughput, step time or held-out score (diagnostics=false). When its files were "
    "written, the file system tells: publish copies, without those times."
)
NOMINAL = "nominal numerics: the rounding of the clipping is not bounded"
MECHANISM = "DP-SGD: clipped gradients of rows are summed and noised, once a step"
PACKAGES = ("fsdp-dp", "torch", "prv-accountant", "opacus", "dp-accounting", "cryptography", "hydra-core")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run: what went in, what came out. Without privacy, the four privacy fields are None."""

    config: TrainConfig
    privacy: PrivacyConfig | None
    corpus: Corpus
    noise_multiplier: float | None
    budget: Budget | None
    standing: Standing | None
    steps: int
    nonfinite_rows: int
    useful_rows: float | None
    held_out: float | None
    parameters: int
    ranks: int
    device: str
    seconds: float


def write_report(outcome: Outcome, path: Path) -> None:
    """Write the report as Markdown."""
    sections = [headline(outcome), guarantee(outcome), assumptions(outcome), unprotected(outcome), setup(outcome)]
    path.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")


def summarize(outcome: Outcome, folder: Path) -> str:
    """The lines that end a run on the terminal."""
    score = outcome.corpus.score
    lines = [
        f"{outcome.steps} steps{took(outcome)}; {claim(outcome)}",
        *(
            [
                f"held-out {score.title} {shown(outcome.held_out)} ({score.baseline}: {outcome.corpus.baseline:.3f}), "
                f"{NOT_PRIVATE}"
            ]
            if outcome.config.diagnostics
            else []
        ),
        f"everything is in {folder}",
    ]
    if outcome.steps < outcome.config.steps:
        lines.append(
            f"stopped at step {outcome.steps} of {outcome.config.steps}; to go on: the same command with resume=true "
            f"output_dir={folder}"
        )
    return "\n".join(lines)


def claim(outcome: Outcome) -> str:
    """The guarantee in one line, or that there is none and why."""
    if outcome.privacy is None or outcome.budget is None:
        return "NOT PRIVATE: plain training (privacy=none)"
    if outcome.noise_multiplier == 0:
        return "NO PRIVACY GUARANTEE: no noise was added (noise_multiplier=0), epsilon is infinite"
    bound = f"epsilon = {outcome.budget.cap:.4g} at delta = {outcome.privacy.target_delta:.3g}"
    if outcome.privacy.seed is not None:
        return f"NO PRIVACY GUARANTEE: seed fixed ({bound} would hold with a secret, random seed)"
    return qualified(bound, outcome.privacy)


def qualified(bound: str, privacy: PrivacyConfig) -> str:
    """The bound, with what takes from it wherever it is quoted alone."""
    return f"{bound} ({NOMINAL})" if privacy.numerics == "nominal" else bound


def took(outcome: Outcome) -> str:
    """How long all steps took, which tells how many rows they drew."""
    return f" in {outcome.seconds:.0f} s" if outcome.config.diagnostics else ""


def shown(value: float | None) -> str:
    return "not evaluated" if value is None else f"{value:.3f}"


def headline(outcome: Outcome) -> str:
    score = outcome.corpus.score
    trained = "trained model" if outcome.config.optimizer.average_decay is None else "trained model, averaged weights"
    scores = [
        "",
        f"| | {score.title} ({NOT_PRIVATE}) |",
        "|---|---|",
        f"| held-out rows, {trained} | {shown(outcome.held_out)} |",
        f"| held-out rows, {score.baseline} | {outcome.corpus.baseline:.3f} |",
    ]
    return "\n".join(
        [
            "# Training report",
            "",
            f"**{claim(outcome)}**",
            *(scores if outcome.config.diagnostics else []),
            "",
            "![Score and epsilon over steps](loss_epsilon.png)",
        ]
    )


def guarantee(outcome: Outcome) -> str:
    """The mechanism and its numbers; empty for plain training."""
    privacy, budget = outcome.privacy, outcome.budget
    if privacy is None or budget is None or outcome.noise_multiplier is None:
        return ""
    return "\n".join(
        [
            "## What is guaranteed",
            "",
            *table(
                (
                    "epsilon",
                    f"{budget.cap:.6g} (upper bound, for the {privacy.steps} releases {settled(outcome.standing)})",
                ),
                ("delta", f"{privacy.target_delta:.6g}"),
                ("unit of privacy", outcome.corpus.unit),
                ("adjacency", adjacency_in_words(privacy)),
                ("mechanism", MECHANISM),
                ("clipping", privacy.clipping_in_words),
                ("noise", noise_in_words(privacy, outcome.noise_multiplier)),
                ("divisor", f"the expected batch size, {privacy.expected_batch_size}"),
                ("sampling", sampling_in_words(privacy)),
                ("releases made", f"{outcome.steps} of {privacy.steps}{lost(outcome)}"),
                ("accountant", privacy.accountant),
                ("numerics", privacy.numerics),
            ),
            *early_stop(outcome),
            *extended(outcome),
        ]
    )


def settled(standing: Standing | None) -> str:
    """When the number of releases was fixed."""
    raised = standing is not None and standing.extended
    return "of a budget that was raised after releases had been made" if raised else "fixed at the start"


def noise_in_words(privacy: PrivacyConfig, noise_multiplier: float) -> str:
    """What is added to a sum; `noise_multiplier` is the one that is accounted."""
    words = f"Gaussian on a lattice, standard deviation σ · R, σ = {noise_multiplier:.6g}"
    if privacy.adaptive_bounds is None:
        return words
    of_sums, _ = split_noise(noise_multiplier, 1, privacy.adaptive_bounds)
    return f"{words}; on the sums {of_sums:.6g}, which with the bounds' noised counts costs the same; R as it is then"


def adjacency_in_words(privacy: PrivacyConfig) -> str:
    """What two neighbouring data sets differ in."""
    zeroed = privacy.max_batch_size is not None or privacy.sampling == "shuffle"
    return f"{'zeroing out' if zeroed else 'adding or removing'} one row"


def sampling_in_words(privacy: PrivacyConfig) -> str:
    """How the rows of a release are drawn."""
    if privacy.sampling == "shuffle":
        return "each row at most once an epoch, in shuffled order; accounted without amplification by sampling"
    words = f"Poisson: each row is in a step's batch independently, with probability {privacy.sample_rate:.6g}"
    if privacy.sampling == "external_poisson":
        words += "; the loader is the user's own, and so is the responsibility for this"
    if privacy.max_batch_size is not None:
        words += f"; a draw of more than {privacy.max_batch_size} rows is cut to that many, chosen at random"
    return words


def lost(outcome: Outcome) -> str:
    """Releases that a crash took: counted, but without effect on the model."""
    standing = outcome.standing
    if standing is None or not standing.lost:
        return ""
    return f", {standing.lost} of which were lost when the run was interrupted, and count all the same"


def table(*rows: tuple[str, str]) -> list[str]:
    """A Markdown table of names and values."""
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def early_stop(outcome: Outcome) -> list[str]:
    """What to say of a run that ended before its last release."""
    if outcome.privacy is None or outcome.budget is None or outcome.steps == outcome.privacy.steps:
        return []
    return [
        "",
        f"The run was stopped after {outcome.steps} of {outcome.privacy.steps} releases. The ε above is still that of "
        "all of them: a decision to stop that may have looked at un-noised metrics is covered by nothing less.",
    ]


def extended(outcome: Outcome) -> list[str]:
    """What to say of a run whose budget was raised."""
    return ["", EXTENDED] if outcome.standing is not None and outcome.standing.extended else []


def assumptions(outcome: Outcome) -> str:
    """Everything that has to hold for ε to be true; empty for plain training."""
    if outcome.privacy is None:
        return ""
    points = assumed(outcome.privacy, outcome.corpus.unit, public_parts(outcome.config.model, outcome.config.data))
    return "\n".join(["## Assumptions", "", *(f"- {point}" for point in points)])


def assumed(privacy: PrivacyConfig, unit: str, public: Sequence[str] = ()) -> list[str]:
    """What has to hold for ε to be true, point by point; `public` is what came from elsewhere (`public_parts`)."""
    points = [
        f"The unit is {unit}. Whoever is in several rows is protected more weakly.",
        f"The number of training rows, {privacy.dataset_size}, is public, and so are the options of this run.",
        "Random bits come from the operating system. The 256-bit keys are never written down, but are in the memory of "
        "the processes: a memory dump exposes the noise.",
        "Only released gradients and what follows from them are covered: the weights, the optimizer state, the "
        "checkpoint.",
        "Other runs on the same rows, to choose hyper-parameters for example, cost privacy that ε does not include.",
        "Nobody observes how long a step takes or how much memory it uses.",
        *(
            f"{part}: public, and made without these rows. What they say about these rows, no noise hides."
            for part in public
        ),
    ]
    if privacy.numerics == "nominal":
        points.append(
            "**Nominal numerics**: the rounding of the clipping is not bounded, as is usual in the field; a row may "
            "contribute more than the clipping bound."
        )
    if privacy.seed is not None:
        points.append("**Seed fixed: no privacy guarantee.** The noise can be computed by anyone who knows the seed.")
    return points


def public_parts(model: ModelConfig, data: DataConfig) -> list[str]:
    """What the run takes from elsewhere, and ε does not cover."""
    pretrained = getattr(model, "pretrained", None)
    return [
        *([f"The pretrained weights ({pretrained})"] if pretrained is not None else []),
        *([f"The tokenizer ({data.tokenizer})"] if data.tokenizer is not None else []),
    ]


def unprotected(outcome: Outcome) -> str:
    """Rule 16: what a run writes and shows that no ε covers, with this run's figures."""
    if not outcome.config.diagnostics:
        return "\n".join(["## Outside the guarantee", "", DIAGNOSTICS_OFF, "", *(f"- {p}" for p in uncovered()[-2:])])
    useful = "" if outcome.useful_rows is None else f" (here {outcome.useful_rows:.0%} of the rows run were no padding)"
    bad = f" (here: {outcome.nonfinite_rows} non-finite rows, which contributed nothing)" if outcome.privacy else ""
    return "\n".join(["## Outside the guarantee", "", *(f"- {point}" for point in uncovered(useful, bad))])


def uncovered(useful: str = "", bad: str = "") -> list[str]:
    """What no ε covers, point by point; `useful` and `bad` are remarks on a run's padding and non-finite rows."""
    return [
        "Training loss (metrics.jsonl, TensorBoard, the figure, the progress bar): computed from un-noised data.",
        f"Rows per second, step times and padding: they reveal how many rows a step drew{useful}.",
        "Held-out scores, and frequencies of bytes, tokens or classes: exact statistics of the held-out rows, private if "
        "they are.",
        f"Norms, and shares or counts of clipped or non-finite rows{bad}.",
        "Comparisons with privacy=none: weights and metrics of that run are not private at all.",
        "The choice of hyper-parameters, by these metrics or by other runs on the same rows.",
    ]


def setup(outcome: Outcome) -> str:
    """What was run, where, with what."""
    config, corpus = outcome.config, outcome.corpus
    return "\n".join(
        [
            "## Setup",
            "",
            "The whole configuration is in config.yaml.",
            "",
            *table(
                (
                    "model",
                    f"{config.model.in_words}; {outcome.parameters:,} trainable parameters",
                ),
                ("data", f"{config.data.source}: {len(corpus.train)} training rows, {len(corpus.held_out)} held out"),
                ("sharding", f"{config.sharding.strategy} on {outcome.ranks} process(es), {outcome.device}"),
                ("precision", config.precision.compute),
                ("training", f"{outcome.steps} of {config.steps} steps"),
                *([("training and evaluation", f"{outcome.seconds:.0f} s")] if config.diagnostics else []),
                ("Python", platform.python_version()),
                *((package, version(package)) for package in PACKAGES),
            ),
        ]
    )


def version(package: str) -> str:
    """The installed version; a checkout that is not installed has none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
