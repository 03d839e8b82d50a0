"""What the experiments of docs/reproductions.md share: their command line, the ranks, and one JSON line a run.

A run is one side of an experiment (`fsdp_dp`, `opacus`, `plain`, ...) with one seed. Runs that the file holds already, of as
many steps, are not run again, so that a script that was ended goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_dp import PrivacyEngine

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "docs" / "reproductions.jsonl"
Row = dict[str, Any]


class Experiment:
    """One script's command line and rows.

    Args:
        name: its module in `scripts/reproduce`.
        description: of the command line.
        seeds, steps: how many of each, unless the command line says otherwise.
    """

    def __init__(self, name: str, description: str | None, *, seeds: int, steps: int) -> None:
        self.name = name
        self._parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self._parser.add_argument("--rows", type=Path, default=ROWS, help="where rows are added (%(default)s)")
        self._parser.add_argument("--seeds", type=int, default=seeds, help="runs of each side (%(default)s)")
        self._parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of a run (%(default)s)")

    def main(self, sides: dict[str, Callable[[int, int], Row]], arguments: Sequence[str] | None = None) -> None:
        """Measure every side, a function of (seed, steps), with every seed; on all ranks alike."""
        words = sys.argv[1:] if arguments is None else list(arguments)
        options = self._parser.parse_args(words)
        with ranks():
            runs = [
                {"experiment": self.name, "side": side, "seed": seed, "steps": options.steps}
                for seed in range(options.seeds)
                for side in sides
            ]
            left, stamp = self._left(runs, options.rows), self._stamp(words)
            for number, run in enumerate(left, 1):
                began = time.monotonic()
                torch.manual_seed(run["seed"])
                figures = sides[run["side"]](run["seed"], run["steps"])
                row = {**run, **figures, "seconds": round(time.monotonic() - began, 1), **stamp}
                if dist.get_rank() == 0:
                    with options.rows.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    print(f"{number}/{len(left)}", json.dumps(row), flush=True)
                dist.barrier()

    def _left(self, runs: list[Row], path: Path) -> list[Row]:
        """As rank 0 sees the file."""
        done = [{key: row[key] for key in ("experiment", "side", "seed", "steps")} for row in read(path)]
        left = [[run for run in runs if run not in done]]
        dist.broadcast_object_list(left)
        return left[0]

    def _stamp(self, words: Sequence[str]) -> Row:
        world = dist.get_world_size()
        start = "python" if world == 1 else f"torchrun --standalone --nproc-per-node={world}"
        return {
            "ranks": world,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": commit(),
            "device": f"CPU ({os.cpu_count()} cores)",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "command": " ".join([start, "-m", f"scripts.reproduce.{self.name}", *words]),
        }


@contextmanager
def ranks() -> Iterator[None]:
    """The default process group for as long as the block lasts: torchrun's, or one rank; the caller's where there is one."""
    if dist.is_initialized():
        yield
        return
    torch.set_num_threads(1)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    try:
        yield
    finally:
        dist.destroy_process_group()


def read(path: Path = ROWS) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def package_folder(name: str) -> Path:
    """Where a package's files are, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"this needs the package {name}: pip install --no-deps -r scripts/reproduce/requirements.txt")
    return Path(spec.origin).parent


def commit() -> str:
    """The commit that last changed the library, and whether the checkout differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "fsdp_dp")
    return (git("log", "-1", "--format=%h", "--", "fsdp_dp") or "unknown") + (" with changes" if changed else "")


def train(
    model: nn.Module,
    engine: PrivacyEngine | None,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> None:
    """A step for each batch; of a private one, which is logical, over its microbatches."""
    for batch in batches:
        for microbatch in batch if engine is not None else [batch]:
            loss(model, microbatch).backward()
        optimizer.step()
        optimizer.zero_grad()


def draws(rows: Sequence[Any], size: int, steps: int, seed: int) -> Iterator[Any]:
    """Batches for training without privacy: `size` rows over all ranks, drawn with replacement."""
    random = torch.Generator().manual_seed(seed)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    for _ in range(steps):
        chosen = torch.randint(len(rows), (size,), generator=random)[mine].tolist()
        yield torch.utils.data.default_collate([rows[i] for i in chosen])


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean over rows of their cross-entropies."""
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor, rows: int = 250) -> float:
    """In per cent; every rank looks at all rows."""
    model.eval()
    pairs = zip(inputs.split(rows), labels.split(rows), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs)
    model.train()
    return round(100 * right / len(labels), 2)
