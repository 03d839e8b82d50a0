"""What a run writes down as it goes, on rank 0: metrics.jsonl, TensorBoard and the progress bar.

Every statistic of un-noised data stands under `outside_the_guarantee`: publishing it is not covered by ε.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fsdp_dp.models.objective import BITS_PER_BYTE, Score
from fsdp_dp.training.run_folder import METRICS_FILE, UNPROTECTED, whole_lines, write_whole

# A progress bar redraws itself often on a terminal and seldom in a log file.
SECONDS_BETWEEN_LINES = 30
# How long a step takes tells how many rows it drew: a bar without times, redrawn every so many steps.
WITHOUT_TIMES = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
REDRAWN = 100


class RunLog:
    """Records, one a step, kept in `records` too for the figure and the report; those of earlier starts are kept.

    `done` of the `steps` count as made. What a crash interrupted is not repeated under the same number: with privacy,
    steps are releases, and each has its own.

    Metrics of the score are named after it: `training_bits_per_byte`, `held_out_accuracy`. Without `diagnostics`, nothing
    of un-noised data is written or shown, nor when a step was made: TensorBoard's clock then counts steps.
    """

    def __init__(
        self, folder: Path, steps: int, done: int = 0, score: Score = BITS_PER_BYTE, diagnostics: bool = True
    ) -> None:
        self.score, self._diagnostics = score, diagnostics
        path = folder / METRICS_FILE
        self.records: list[dict[str, Any]] = [record for record in whole_lines(path) if record["step"] <= done]
        write_whole(path, "".join(map(as_line, self.records)))
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"))
        self._bar = progress_bar(steps, done, diagnostics)
        self._shown: dict[str, str] = {}

    def step(self, step: int, epsilon: float | None, learning_rate: float, found: dict[str, float]) -> None:
        """Write down one optimizer step and what `diagnostics.Step` found."""
        unprotected = {f"training_{self.score.name}" if name == "score" else name: found[name] for name in found}
        record = {"step": step, "epsilon": epsilon, "learning_rate": learning_rate}
        self._write(record | {UNPROTECTED: unprotected if self._diagnostics else {}})
        self._shown["ε"] = "none: not private" if epsilon is None else f"{epsilon:.3f}"
        if self._diagnostics:
            self._shown |= {
                f"not private: {self.score.title}": f"{found['score']:.3f}",
                "rows/s": f"{found['rows_per_second']:.0f}",
            }
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update()

    def evaluation(self, step: int, epsilon: float | None, value: float, rows: int) -> None:
        """Write down the score on `rows` held-out rows."""
        unprotected = {f"held_out_{self.score.name}": value}
        self._write({"step": step, "epsilon": epsilon, "rows": rows, UNPROTECTED: unprotected})
        self._shown["held-out"] = f"{value:.3f}"
        self._bar.set_postfix(self._shown, refresh=False)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric, private or not, where it was recorded."""
        return series(self.records, name)

    def mean(self, name: str) -> float | None:
        """The mean of a metric over the steps; None where there were none."""
        _, values = self.series(name)
        return sum(values) / len(values) if values else None

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._file.write(as_line(record))
        self._file.flush()
        named = {f"{UNPROTECTED}/{name}": value for name, value in record[UNPROTECTED].items()}
        named |= {name: record[name] for name in ("epsilon", "learning_rate") if record.get(name) is not None}
        clock = None if self._diagnostics else float(record["step"])
        for name, value in named.items():
            self._board.add_scalar(name, value, record["step"], walltime=clock)


def progress_bar(steps: int, done: int, times: bool) -> Any:
    """On stderr; without `times`, what it shows and when does not depend on how long steps take."""
    if not times:
        return tqdm(
            total=steps, initial=done, bar_format=WITHOUT_TIMES, mininterval=0.0, maxinterval=math.inf,
            miniters=max(1, steps // REDRAWN),
        )  # fmt: skip
    interval = 0.5 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
    return tqdm(total=steps, initial=done, unit="step", mininterval=interval)


def series(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric, private or not, where it was recorded."""
    flat = [(record["step"], {**record, **(record.get(UNPROTECTED) or {})}.get(name)) for record in records]
    found = [(step, number(value)) for step, value in flat]
    return [step for step, value in found if value is not None], [value for _, value in found if value is not None]


def number(value: Any) -> float | None:
    """A metric as a number: "nan", as JSON has it, is one too; what a damaged file holds instead is none."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


def as_line(record: dict[str, Any]) -> str:
    return json.dumps(finite_or_text(record)) + "\n"


def finite_or_text(value: Any) -> Any:
    """The value as JSON allows it: infinities and NaN, for which it has no number, as text."""
    if isinstance(value, dict):
        return {key: finite_or_text(item) for key, item in value.items()}
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
