"""The pictures of a report: one metric over releases, one line for each run."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import NamedTuple

from fsdp_dp.reporting.page import Figure
from fsdp_dp.reporting.run import Run
from fsdp_dp.training.metrics import series

NOT_PRIVATE = "not private: computed from un-noised data"


class Metric(NamedTuple):
    """A metric of metrics.jsonl, its axis, and whether ε covers it."""

    name: str
    label: str
    private: bool = False


EPSILON = Metric("epsilon", "ε (upper bound)", private=True)
DIAGNOSTICS = (
    Metric("training_bits_per_byte", "training loss, bits per byte"),
    Metric("held_out_bits_per_byte", "held-out loss, bits per byte"),
    Metric("rows_per_second", "throughput, rows per second"),
    Metric("useful_rows", "useful rows, share of the rows run"),
)


def figures(runs: Sequence[Run], *, diagnostics: bool) -> list[Figure]:
    """ε over releases and, where asked for, what is not private; a metric that no run recorded has no figure."""
    drawn = (draw(runs, metric) for metric in (EPSILON, *(DIAGNOSTICS if diagnostics else ())))
    return [figure for figure in drawn if figure is not None]


def draw(runs: Sequence[Run], metric: Metric) -> Figure | None:
    """One metric of all runs as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = {run.name: series(run.records, metric.name) for run in runs}
    if not any(steps for steps, _ in lines.values()):
        return None
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    for name, (steps, values) in lines.items():
        axes.plot(steps, values, label=name, marker="." if len(steps) < 20 else None, linewidth=1)
    axes.set(xlabel="release (optimizer step)", ylabel=metric.label)
    if not metric.private:
        axes.set_title(NOT_PRIVATE, color="tab:red", fontsize="medium")
    axes.legend()
    figure.tight_layout()
    image = BytesIO()
    figure.savefig(image, dpi=110, format="png")
    pyplot.close(figure)
    return Figure(metric.name, caption(metric), image.getvalue())


def caption(metric: Metric) -> str:
    return metric.label if metric.private else f"{metric.label} ({NOT_PRIVATE})"
