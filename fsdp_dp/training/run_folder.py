"""The folder of a run: made for a new one, recognised for one that goes on."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from fsdp_dp.ledger import LEDGER_FILE
from fsdp_dp.training.schema import TrainConfig

CONFIG_FILE, METRICS_FILE, CHECKPOINTS = "config.yaml", "metrics.jsonl", "checkpoints"
# Where a record of the metrics has what ε does not cover.
UNPROTECTED = "outside_the_guarantee"
# What makes a run the same run; the ledger looks after the options of privacy that do.
FIXED = ("model", "data", "batch_size", "optimizer.name", "privacy.mechanism")


def check_folder(config: TrainConfig) -> None:
    """Raise ValueError if the folder holds a run that `config` neither goes on with nor could."""
    if config.output_dir is None:
        return
    folder = Path(config.output_dir)
    if not any((*folder.glob(METRICS_FILE), *folder.glob(LEDGER_FILE), *folder.glob(f"{CHECKPOINTS}/step-*"))):
        return
    if not config.resume:
        raise ValueError(
            f"output_dir={folder} already holds a run: go on with it by resume=true, or choose another, or remove it."
        )
    if not config.diagnostics and any(record.get(UNPROTECTED) for record in whole_lines(folder / METRICS_FILE)):
        raise ValueError(
            f"diagnostics=false: earlier starts of the run in {folder} wrote down what epsilon does not cover, in "
            f"{METRICS_FILE} and tensorboard/ (and report.md and loss_epsilon.png, if one ended). Remove these, or go on "
            "with diagnostics=true."
        )
    if not (folder / CONFIG_FILE).exists():
        return  # killed at its very start; what its ledger holds is checked there
    before, now = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8")), asdict(config)
    if before["privacy"]["mechanism"] != "none" and not (folder / LEDGER_FILE).exists():
        raise ValueError(
            f"{folder} holds a private run without its {LEDGER_FILE}: releases were made there, and nothing tells how many. "
            "Bring the ledger back; without it, count the whole budget as spent and choose another output_dir."
        )
    for option in FIXED:
        was, found = value_of(before, option), value_of(now, option)
        if was != found:
            name, was, found = _where_they_differ(option, was, found)
            raise ValueError(
                f"{name} was {was} when the run in {folder} began and is {found} now: a run "
                "keeps its model, data, batch and optimizer. Use the old value, or another output_dir."
            )


def _where_they_differ(option: str, was: Any, found: Any) -> tuple[str, Any, Any]:
    """The first option within two groups of options that has two values, and these; other values are themselves."""
    if isinstance(was, dict) and isinstance(found, dict) and was.keys() == found.keys():
        key = next(key for key in was if was[key] != found[key])
        return _where_they_differ(f"{option}.{key}", was[key], found[key])
    return option, was, found


def make_folder(config: TrainConfig) -> Path:
    """The run's folder, made if need be, by its absolute path."""
    folder = Path(config.output_dir) if config.output_dir is not None else _unused()
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def write_config(config: TrainConfig, folder: Path) -> None:
    """Write the configuration of this start."""
    write_whole(folder / CONFIG_FILE, yaml.safe_dump(asdict(config), sort_keys=False))


def write_whole(path: Path, text: str) -> None:
    """Write a file in one go: a process that dies here, or a full disk, leaves the file that was there, not half of one."""
    draft = path.with_name(f"{path.name}.new")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a line that a crash cut short, or that is no record of a step, is left out."""
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def last_step(folder: Path) -> int:
    """The last step that the metrics tell of; 0 where there are none."""
    return max((record["step"] for record in whole_lines(folder / METRICS_FILE)), default=0)


def value_of(options: dict[str, Any], path: str) -> Any:
    """The value of an option as the command line names it: `optimizer.name`."""
    value: Any = options
    for name in path.split("."):
        value = value[name]
    return value


def _unused() -> Path:
    """A folder under outputs/ named by the time, with a number where runs start in the same second."""
    name = Path("outputs") / time.strftime("%Y-%m-%d_%H-%M-%S")
    names = (name if i == 0 else name.with_name(f"{name.name}_{i}") for i in range(1000))
    return next(folder for folder in names if not folder.exists())
