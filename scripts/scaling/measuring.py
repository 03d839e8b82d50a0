"""Rows in a folder: which of them are missing, and torchrun for these."""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fsdp_dp.benchmark.measure import append
from fsdp_dp.benchmark.report import Row, key, read
from scripts.scaling import checks
from scripts.scaling.running import torchrun
from scripts.scaling.wanted import Launch

# With foreach, torch's default, AdamW's copies would be the peak. Rows of 128 tokens for the checks of the first step.
_LARGEST = {"cuda": ["--models", "6_7b:1", "--fused", "--first-tokens", "128"], "cpu": ["--models", "tiny:2"]}
_TINY_GIB = 0.002


class Measuring:
    """What there is in the folder, and what adds to it."""

    def __init__(self, options: argparse.Namespace, host: dict[str, Any]) -> None:
        self.options, self.host = options, host
        self._rows, self._largest = options.folder / "rows.jsonl", options.folder / "largest.jsonl"
        self._log = options.folder / "log.txt"
        self._before = len(read(self._rows)) if options.retry else 0
        self._torchrun = functools.partial(
            torchrun,
            cpu=options.device == "cpu",
            log=self._log,
            patience=options.patience,
            deadline=time.monotonic() + 60 * (options.minutes or math.inf),
        )

    def measure(self, launch: Launch) -> None:
        """The rows of this start of torchrun that are missing; one that fails is written down, and the rest goes on."""
        while missing := self._missing(launch):
            print(f"{launch.gpus} x {launch.sharding}: {len(missing)} rows to measure", flush=True)
            progress = Progress(self._rows)
            failed = self._torchrun(launch.gpus, self._benchmark(launch), tick=progress)
            left = self._missing(launch)
            if left and "failed" not in (progress.last or {}):
                why = failed or "torchrun ended without its row"
                append(self._rows, left[0] | {"torch": torch.__version__, "command": _command(), "failed": why})
                progress()

    def _benchmark(self, launch: Launch) -> list[str]:
        counts = [str(count) for count in launch.counts]
        return [
            *("-m", "fsdp_dp.benchmark", *launch.texts(), "--sharding", launch.sharding, "--microbatches", *counts),
            *("--steps", str(self.options.steps), "--warmup", str(self.options.warmup)),
            *("--commit", self.options.commit, "--output", str(self._rows.resolve())),
        ]

    def rows_of(self, launches: Sequence[Launch]) -> list[Row]:
        """Those that there are, in the order in which they are wanted."""
        there = {key(row): row for row in self._read()}
        return [there[key(row)] for launch in launches for row in self._named(launch) if key(row) in there]

    def _missing(self, launch: Launch) -> list[dict[str, Any]]:
        there = {key(row) for row in self._read()}
        return [row for row in self._named(launch) if key(row) not in there]

    def _read(self) -> list[Row]:
        """Less those that had failed before, if these are wanted again."""
        rows = read(self._rows)
        return [row for i, row in enumerate(rows) if i >= self._before or "failed" not in row]

    def _named(self, launch: Launch) -> list[dict[str, Any]]:
        where = {"sharding": launch.sharding, "gpus": launch.gpus, **self._stamp(launch.gpus)}
        return [{"case": case.name, "side": case.side, **where} for case in launch.cases()]

    def _stamp(self, gpus: int) -> dict[str, str]:
        return {"device": f"{gpus} x {self.host.get('name')}", "commit": self.options.commit}

    def find_largest(self, gpus: int, side: str) -> None:
        """The deepest model that the planner says fits, and whether it trains."""
        stamp = self._stamp(gpus)
        if any(row["side"] == side and stamp.items() <= row.items() for row in self.largest()):
            return
        print(f"{gpus} x full_shard, the largest model, {side}", flush=True)
        start = self._log.stat().st_size if self._log.exists() else 0
        failed = self._torchrun(gpus, self._check_plan(side), tick=lambda: False)
        told = self._log.read_bytes()[start:].decode(errors="replace").splitlines()
        found = [json.loads(line) for line in told if line.startswith("{")]
        row = found[-1] if found else {"world_size": gpus, "side": side, "failed": failed or "no row"}
        append(self._largest, row | stamp | {"torch": torch.__version__})
        print("  " + (row.get("failed") or f"{row['layers']} blocks"), flush=True)

    def _check_plan(self, side: str) -> list[str]:
        device, memory = self.options.device, self.options.memory_gib
        usual = _TINY_GIB if device == "cpu" else math.floor(self.host["GiB"] - 1)
        return [
            *("scripts/check_plan_on_gpus.py", "--largest", "--sides", side, *_LARGEST[device]),
            *("--memory-gib", str(memory or usual), *(["--cap"] if memory else [])),
        ]

    def largest(self) -> list[Row]:
        """Rows of `check_plan_on_gpus`, in the order in which they were measured."""
        if not self._largest.exists():
            return []
        return [json.loads(line) for line in self._largest.read_text(encoding="utf-8").splitlines()]


class Progress:
    """Called again and again: prints the rows that were added to a file, each with its checks; whether there were any."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen = path, len(read(path))
        self.last: Row | None = None

    def __call__(self) -> bool:
        rows = read(self.path)
        for row in rows[self.seen :]:
            print(f"  {checks.line(row, checks.plain_of(row, rows))}", flush=True)
            self.last = row
        self.seen, before = len(rows), self.seen
        return self.seen > before


def _command() -> str:
    return " ".join(["python -m scripts.scaling", *sys.argv[1:]])
