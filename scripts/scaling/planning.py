"""The peak memory that the planner predicts for what is measured; kept in a file, for it takes some seconds a row."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fsdp_dp.benchmark.cases import Case
from fsdp_dp.benchmark.measure import append
from scripts.scaling.predictions import all_predicted, predicted_or_why_not, step_of
from scripts.scaling.wanted import Launch

Key = tuple[Any, ...]


def plan(launches: Sequence[Launch], path: Path, commit: str, *, on_gpu: bool) -> Mapping[Key, float | None]:
    """GiB by case, side, sharding and number of GPUs; None where a step cannot be planned."""
    wanted = {named(case, launch): (case, launch) for launch in launches for case in launch.cases()}
    said = _read(path, commit, on_gpu)
    missing = {_alike(case, launch): (case, launch) for case, launch in wanted.values()}
    missing = {alike: pair for alike, pair in missing.items() if alike not in said}
    if missing:
        print(f"planning {len(missing)} steps, some seconds each", flush=True)
    steps = [step_of(case, launch.gpus, on_gpu=on_gpu) for case, launch in missing.values()]
    for alike, found in zip(missing, all_predicted(steps, predicted_or_why_not), strict=True):
        if "failed" in found:
            print(f"  not planned: {alike}: {found['failed']}", flush=True)
        append(path, {"of": alike, "commit": commit, "on_gpu": on_gpu, **found})
        said[alike] = found["GiB"]
    return {key: said[_alike(*pair)] for key, pair in wanted.items()}


def named(case: Case, launch: Launch) -> Key:
    return case.name, case.side, launch.sharding, launch.gpus


def _alike(case: Case, launch: Launch) -> Key:
    """All microbatches after the first need the same memory."""
    return named(dataclasses.replace(case, microbatches=min(case.microbatches, 2)), launch)


def _read(path: Path, commit: str, on_gpu: bool) -> dict[Key, float | None]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {tuple(row["of"]): row["GiB"] for row in rows if (row["commit"], row["on_gpu"]) == (commit, on_gpu)}
