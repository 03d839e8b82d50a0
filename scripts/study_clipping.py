"""Which clip function, and which clipping groups? Every combination on two small tasks, at one epsilon.

    python scripts/study_clipping.py --workers 16 --rows runs.jsonl     one line a run; what is there is not run again
    python scripts/study_clipping.py --rows runs.jsonl --report         the table, and docs/figures/study_clipping.png

The study of docs/clipping.md. A *cell* is a clip function with a grouping; each is trained at every learning rate (and,
for "abadi", bound) of one grid, which is the same for all cells. What is best on the validation rows, in the mean over
seeds, is reported on the test rows. Same seed: same initial weights, same draws of rows, same noise.

The noise multipliers are those of `fsdp_dp.accounting` for EPSILON (`--report` computes epsilon from them anew), so that
runs need torch and numpy alone; `--data` keeps both data sets in one file for machines without scikit-learn. Choosing
the best of a grid costs privacy that is not counted here: both data sets are public.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fsdp_dp import AdaptiveBounds, PrivacyConfig, make_private
from fsdp_dp.data.packing import pack, split_row
from fsdp_dp.data.python_source import python_source
from fsdp_dp.models.config import GPTConfig
from fsdp_dp.models.gpt import GPT
from fsdp_dp.models.objective import row_losses

EPSILON = 3.0
SEEDS = (0, 1, 2)
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
BOUNDS = (0.1, 0.5, 2.0)
GROUPINGS = ("flat", "block", "layer", "parameter")
CELLS = (
    *itertools.product(("abadi", "automatic", "normalized"), GROUPINGS),
    *itertools.product(("adaptive",), ("flat", "layer")),
)
FIGURE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "study_clipping.png"


class Split(NamedTuple):
    """Inputs and targets of the three parts of a data set."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A data set, a model and a budget. ``score`` is better where ``sign * score`` is larger."""

    data: Callable[[Mapping[str, Any]], Split]
    model: Callable[[], nn.Module]
    losses: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    metric: str
    sign: int
    steps: int
    batch: int
    noise_multiplier: float
    target_delta: float


# ------------------------------------------------------------------------------------------------------------- digits


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD + F.gelu(self.linear(self.norm(x_BD)))


class DigitsMlp(nn.Module):
    """64 pixels -> 10 classes."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x_BD: Tensor) -> Tensor:
        x_BD = self.first(x_BD)
        for block in self.blocks:
            x_BD = block(x_BD)
        return self.head(self.norm(x_BD))


def digits(arrays: Mapping[str, Any]) -> Split:
    """The 1797 digits that scikit-learn ships, 8 x 8 pixels: 1197 to train on, 300 and 300 held out."""
    pixels, labels = torch.from_numpy(arrays["digits"]).float() / 8 - 1, torch.from_numpy(arrays["labels"]).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return Split(*((pixels[i], labels[i]) for i in order.split([len(labels) - 600, 300, 300])))


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return 100 * float((outputs.argmax(1) == targets).float().mean())


# --------------------------------------------------------------------------------------------------------------- text

TEXT_ROWS, POSITIONS = {"train": 20_000, "validation": 1_000, "test": 1_000}, 32


def text(arrays: Mapping[str, Any]) -> Split:
    """Rows of 33 bytes of Python's standard library, from files in a random order."""
    rows = torch.from_numpy(arrays["text"])
    return Split(*map(split_row, rows.split(list(TEXT_ROWS.values()))))


def bits_per_byte(outputs: Tensor, targets: Tensor) -> float:
    return float(row_losses(outputs, targets).mean()) / math.log(2)


def gpt() -> nn.Module:
    return GPT(GPTConfig(layers=2, heads=2, width=32, mlp_width=64, block_size=POSITIONS))


TASKS = {
    "digits": Task(
        data=digits,
        model=DigitsMlp,
        losses=functools.partial(F.cross_entropy, reduction="none"),
        score=accuracy,
        metric="test accuracy, %",
        sign=1,
        steps=100,
        batch=128,
        noise_multiplier=1.77,
        target_delta=1e-5,
    ),
    "text": Task(
        data=text,
        model=gpt,
        losses=row_losses,
        score=bits_per_byte,
        metric="test bits per byte",
        sign=-1,
        steps=150,
        batch=128,
        noise_multiplier=0.665,
        target_delta=1e-6,
    ),
}


def load_arrays(path: Path) -> dict[str, Any]:
    """Both data sets, from a file of an earlier call where there is one."""
    if not path.exists():
        from sklearn.datasets import load_digits

        documents = python_source()
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
        rows = pack([documents[i] for i in order], POSITIONS + 1)[: sum(TEXT_ROWS.values())]
        pixels, labels = load_digits(return_X_y=True)
        np.savez_compressed(path, digits=pixels.astype("uint8"), labels=labels.astype("uint8"), text=rows.numpy())
    with np.load(path) as arrays:
        return dict(arrays)


# -------------------------------------------------------------------------------------------------------------- a run


@dataclasses.dataclass(frozen=True, order=True)
class Run:
    """One training: a cell, at one point of the grid."""

    task: str
    function: str
    grouping: str
    bound: float
    learning_rate: float
    seed: int


def all_runs() -> list[Run]:
    """The grid; a bound only where it means more than a unit of the learning rate."""
    return [
        Run(task, function, grouping, bound, learning_rate, seed)
        for task, (function, grouping), seed in itertools.product(TASKS, CELLS, SEEDS)
        for bound in (BOUNDS if function == "abadi" else (1.0,))
        for learning_rate in LEARNING_RATES
    ]


def privacy_of(run: Run, dataset_size: int) -> PrivacyConfig:
    task = TASKS[run.task]
    return PrivacyConfig(
        max_grad_norm=run.bound,
        noise_multiplier=task.noise_multiplier,
        expected_batch_size=task.batch,
        dataset_size=dataset_size,
        target_delta=task.target_delta,
        clipping=run.grouping,  # type: ignore[arg-type]
        clip_function="abadi" if run.function == "adaptive" else run.function,  # type: ignore[arg-type]
        adaptive_bounds=AdaptiveBounds() if run.function == "adaptive" else None,
        seed=run.seed,
    )


def train(run: Run, data: Path) -> dict[str, Any]:
    """One line of the results."""
    start, task = time.monotonic(), TASKS[run.task]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "seed fixed")
    split = task.data(load_arrays(data))
    torch.manual_seed(run.seed)
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=run.learning_rate)
    engine = make_private(model, privacy_of(run, len(split.train[0])), optimizer)
    loader = engine.loader(list(zip(*split.train, strict=True)), microbatch_size=task.batch * 5 // 4, steps=task.steps)
    for logical_batch in loader:
        for inputs, targets in logical_batch:
            task.losses(model(inputs), targets).mean().backward()
        optimizer.step()
    with torch.no_grad():
        scores = {name: task.score(model(x), y) for name, (x, y) in split._asdict().items() if name != "train"}
    return {
        **dataclasses.asdict(run),
        **scores,
        "median_norm": float(engine.per_sample_norms.median()),
        "last_bound": engine.max_grad_norm,
        "seconds": round(time.monotonic() - start, 2),
    }


def run_all(rows: Path, data: Path, workers: int) -> None:
    """The runs that are not in the file yet; each is written as soon as it is done."""
    load_arrays(data)
    done = {Run(**{f.name: row[f.name] for f in dataclasses.fields(Run)}) for row in read(rows)}
    left = sorted(set(all_runs()) - done, key=lambda run: (run.seed, run))
    with multiprocessing.get_context("spawn").Pool(workers) as pool, rows.open("a") as file:
        for number, row in enumerate(pool.imap_unordered(functools.partial(train, data=data), left), 1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{number}/{len(left)}", json.dumps(row), flush=True)


def read(rows: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


# ------------------------------------------------------------------------------------------------------------- report


class Result(NamedTuple):
    """A cell at its best point of the grid: test scores of its seeds."""

    task: str
    function: str
    grouping: str
    bound: float
    learning_rate: float
    scores: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.scores)


def best_of_cells(rows: Iterable[Mapping[str, Any]]) -> list[Result]:
    """Chosen by the mean over seeds on the validation rows."""
    points: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        points.setdefault(tuple(row[k] for k in ("task", "function", "grouping", "bound", "learning_rate")), []).append(
            row
        )
    best: dict[tuple[Any, ...], tuple[float, Result]] = {}
    for point, runs in points.items():
        value = TASKS[point[0]].sign * statistics.mean(run["validation"] for run in runs)
        found = (value, Result(*point, [run["test"] for run in runs]))
        best[point[:3]] = max(best.get(point[:3], found), found, key=lambda x: x[0])
    return [best[task, *cell][1] for task in TASKS for cell in CELLS if (task, *cell) in best]


def report(rows: Path) -> None:
    """Markdown on standard output, and the plot."""
    from fsdp_dp import accounting

    results = best_of_cells(read(rows))
    for name, task in TASKS.items():
        size = {"digits": 1197, "text": TEXT_ROWS["train"]}[name]
        spent = accounting.epsilon(
            noise_multiplier=task.noise_multiplier,
            sample_rate=task.batch / size,
            steps=task.steps,
            delta=task.target_delta,
        )
        print(f"\n{name}: epsilon <= {spent.upper:.3f} at delta {task.target_delta:g}\n")
        print(f"| clip function | groups | {task.metric} | R | learning rate |\n|---|---|---|---|---|")
        for r in (r for r in results if r.task == name):
            bound = f"{r.bound:g}" if r.function == "abadi" else ""
            scores = f"{r.mean:.2f} ± {r.deviation:.2f}"
            print(f"| {r.function} | {r.grouping} | {scores} | {bound} | {r.learning_rate:g} |")
    plot(results)


def plot(results: Iterable[Result]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = list(results)
    figure, panels = plt.subplots(1, len(TASKS), figsize=(10, 3.6), layout="constrained")
    functions = list(dict.fromkeys(function for function, _ in CELLS))
    for axes, (name, task) in zip(panels, TASKS.items(), strict=True):
        for shift, function in enumerate(functions):
            mine = [r for r in results if (r.task, r.function) == (name, function)]
            axes.errorbar(
                [GROUPINGS.index(r.grouping) + 0.12 * (shift - 1.5) for r in mine],
                [r.mean for r in mine],
                [r.deviation for r in mine],
                fmt="osD^"[shift],
                capsize=2,
                label=function,
            )
        axes.set(title=name, ylabel=task.metric, xticks=range(len(GROUPINGS)), xticklabels=GROUPINGS)
        axes.grid(axis="y", alpha=0.3)
    panels[0].legend(fontsize=8)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=Path, default=Path("study_clipping.jsonl"), help="results, one JSON object a line"
    )
    parser.add_argument("--data", type=Path, default=Path("study_clipping.npz"), help="both data sets; made if absent")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only print and plot what is in --rows")
    options = parser.parse_args()
    if options.report:
        report(options.rows)
    else:
        run_all(options.rows, options.data, options.workers)


if __name__ == "__main__":
    main()
