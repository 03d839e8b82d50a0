"""A run as its folder tells of it: what it says itself (config.yaml, metrics.jsonl), and what its ledger proves.

A private run is reported only as far as its ledger holds together: one that is missing, damaged or does not fit the
checkpoints leaves no ε to state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from fsdp_dp.accounting import AccountingError, EpsilonBounds
from fsdp_dp.config import AdaptiveBounds, PrivacyConfig
from fsdp_dp.data.config import DataConfig, check_fit
from fsdp_dp.data.corpus import describe_unit
from fsdp_dp.ledger import LEDGER_FILE, LedgerError, check_run, verdict
from fsdp_dp.models.config import ModelConfig, model_config
from fsdp_dp.standing import Standing
from fsdp_dp.training.run_folder import CONFIG_FILE, METRICS_FILE, value_of, whole_lines

# Options of a run that reports read, besides those of its model and its data.
SHOWN = ("privacy.mechanism", "sharding.strategy", "steps", "batch_size", "optimizer.learning_rate")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run; `standing`, `privacy` and `bounds` are None where no ε can be stated, and `verdict` says why.

    `bounds` are those of all the releases that the run committed to, or of those that count as spent without a budget.
    """

    name: str
    config: dict[str, Any]
    records: list[dict[str, Any]]
    verdict: str
    standing: Standing | None = None
    privacy: PrivacyConfig | None = None
    bounds: EpsilonBounds | None = None

    @property
    def claimed_private(self) -> bool:
        """Whether the configuration asked for privacy."""
        return bool(self.config["privacy"]["mechanism"] != "none")

    @property
    def model(self) -> ModelConfig:
        return model_config(self.config["model"])

    @property
    def data(self) -> DataConfig:
        return DataConfig(**self.config["data"])

    @property
    def unit(self) -> str:
        return describe_unit(self.data, self.model)

    @property
    def guaranteed(self) -> bool:
        """Whether there is an ε to state: a ledger that holds, noise, and no seed that somebody knows."""
        if self.bounds is None or self.standing is None:
            return False
        return math.isfinite(self.bounds.upper) and not self.standing.seeded

    @property
    def releases(self) -> int:
        """The releases that ε is of."""
        assert self.standing is not None
        return self.standing.counted if self.standing.budget is None else self.standing.budget

    @property
    def noise_multiplier(self) -> float:
        assert self.standing is not None
        return float(self.standing.mechanism["noise_multiplier"])


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        ValueError: the folder holds no run of `fsdp_dp.train`.
    """
    try:
        config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{folder} holds no run: {error}. Name the folder that fsdp_dp.train wrote (output_dir)"
        ) from error
    run = Run(name=folder.resolve().name, config=config, records=whole_lines(folder / METRICS_FILE), verdict="")
    check_config(run, folder)
    return with_ledger(run, folder)


def check_config(run: Run, folder: Path) -> None:
    """Raise ValueError where the configuration is not one that this version of fsdp_dp reads."""
    try:
        for option in SHOWN:
            value_of(run.config, option)
        check_fit(run.data, run.model)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / CONFIG_FILE} is damaged, or of another version of fsdp_dp ({type(error).__name__}: {error}): nothing "
            "can be said of this run"
        ) from error


def with_ledger(run: Run, folder: Path) -> Run:
    """The run with its ledger's verdict, and with what a sound ledger lets one state."""
    if not run.claimed_private:
        return replace(run, verdict="none: plain training keeps no ledger")
    try:
        chain = check_run(folder)
        standing = replace(chain.standing(), counted=chain.counted)
        check_against_metrics(chain.counted, run.records)
        releases = standing.counted if standing.budget is None else standing.budget
        bounds = standing.epsilon(releases)
    except (LedgerError, AccountingError, OSError) as error:
        return replace(run, verdict=f"FAILED: {error}")
    return replace(run, verdict=verdict(chain), standing=standing, privacy=privacy_of(standing), bounds=bounds)


def check_against_metrics(counted: int, records: Sequence[dict[str, Any]]) -> None:
    """Raise LedgerError where the metrics tell of more releases than the ledger counts: of one that was cut, say."""
    made = max((record["step"] for record in records), default=0)
    if made > counted:
        raise LedgerError(
            f"{LEDGER_FILE} counts {counted} releases, and {METRICS_FILE} beside it tells of step {made}: the ledger was cut "
            "or replaced"
        )


def privacy_of(standing: Standing) -> PrivacyConfig:
    """The mechanism as the ledger has it: what was released, whatever config.yaml says now."""
    mechanism = dict(standing.mechanism)
    adaptive = mechanism.pop("adaptive_bounds")
    return PrivacyConfig(
        **mechanism,
        **standing.options,
        adaptive_bounds=None if adaptive is None else AdaptiveBounds(**adaptive),
        steps=standing.budget,
        seed=0 if standing.seeded else None,  # which seed, is in no ledger
    )
