"""The pictures of a report: what happened over releases, one colour for each run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

from fsdp_dp.models.objective import ACCURACY, SCORES, Score
from fsdp_dp.reporting.page import Figure
from fsdp_dp.reporting.run import Run
from fsdp_dp.training.metrics import series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOT_PRIVATE = "not private: computed from un-noised data"
COLOURS = ("#1f5fa8", "#d1602a", "#2f8f5b", "#8a4fa3", "#a8891f", "#4f8f9f")
STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#999999", "axes.grid": True,
    "grid.color": "#e4e4e4", "grid.linewidth": 0.7, "legend.frameon": False, "axes.axisbelow": True,
    "xtick.color": "#555555", "ytick.color": "#555555", "axes.labelcolor": "#333333",
}  # fmt: skip


class Picture(NamedTuple):
    """A picture, the metrics that it shows, its axis and where that starts and ends, what it shows in words, how one run is
    drawn into it, and whether ε covers it."""

    name: str
    metrics: tuple[str, ...]
    axis: str
    words: str
    draw: Callable[[Axes, Run, str], Any]
    limits: tuple[float | None, float | None] = (None, None)
    private: bool = False


def figures(runs: Sequence[Run], pictures: Sequence[Picture]) -> list[Figure]:
    """Those of which some run has something to show."""
    shown = [(picture, [has(run, picture) for run in runs]) for picture in pictures]
    return [figure(runs, picture, some) for picture, some in shown if any(some)]


def has(run: Run, picture: Picture) -> bool:
    """Whether the run recorded a metric of it; ε is only shown where it is one, whatever was recorded."""
    return (run.guaranteed or not picture.private) and any(series(run.records, metric)[0] for metric in picture.metrics)


def figure(runs: Sequence[Run], picture: Picture, is_shown: Sequence[bool]) -> Figure:
    """A picture as a PNG of those runs that are drawn, each in its own colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        drawn, axes = pyplot.subplots(figsize=(5.2, 2.9))
        for number, (run, shown) in enumerate(zip(runs, is_shown, strict=True)):
            if shown:
                picture.draw(axes, run, COLOURS[number % len(COLOURS)])
        axes.set(xlabel="release (optimizer step)", ylabel=picture.axis, ylim=picture.limits)
        if not picture.private:
            axes.set_title(NOT_PRIVATE, color="#a33", fontsize=7, loc="right", pad=14)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 0.98), ncols=4, borderpad=0, handlelength=1.4)
        drawn.tight_layout()
        image = BytesIO()
        drawn.savefig(image, dpi=115, format="png", pil_kwargs={"optimize": True})
        pyplot.close(drawn)
    return Figure(picture.name, caption(picture), image.getvalue())


def caption(picture: Picture) -> str:
    return picture.words if picture.private else f"{picture.words} ({NOT_PRIVATE})"


def label(run: Run) -> str:
    """A run in a legend, which would read a formula between dollars, and leaves out what begins with an underscore."""
    return f"\u200b{run.name}".replace("$", r"\$")


# ------------------------------------------------------------------------------------------------ how a run is drawn


def line(metric: str) -> Callable[[Axes, Run, str], Any]:
    def draw(axes: Axes, run: Run, colour: str) -> None:
        axes.plot(*series(run.records, metric), color=colour, label=label(run), linewidth=1.0)

    return draw


def draw_epsilon(axes: Axes, run: Run, colour: str) -> None:
    """The bound by release, and that of the whole budget."""
    steps, values = series(run.records, "epsilon")
    axes.plot(steps, values, color=colour, drawstyle="steps-post", label=label(run), linewidth=1.6)
    if run.bounds is not None:
        axes.axhline(run.bounds.upper, color=colour, linestyle=":", linewidth=1)


def draw_score(score: Score) -> Callable[[Axes, Run, str], Any]:
    def draw(axes: Axes, run: Run, colour: str) -> None:
        steps, values = series(run.records, f"held_out_{score.name}")
        axes.plot(*series(run.records, f"training_{score.name}"), color=colour, linewidth=0.9, alpha=0.55)
        axes.plot(steps, values, color=colour, marker="o", markersize=4, linewidth=1.3, label=label(run))

    return draw


def draw_norms(axes: Axes, run: Run, colour: str) -> None:
    """The median, a band from the tenth to the ninetieth percentile, and the bound."""
    (steps, low), (_, middle), (_, high) = (series(run.records, f"norm_{level}") for level in (10, 50, 90))
    axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(steps, middle, color=colour, label=label(run), linewidth=1.3)
    axes.axhline(1.0, color="#555555", linestyle=":", linewidth=1)
    axes.set_yscale("log")


def scores() -> Iterator[Picture]:
    for score in SCORES:
        metrics = (f"training_{score.name}", f"held_out_{score.name}")
        what = score.title if score is ACCURACY else f"loss, {score.title}"
        yield Picture(
            score.name, metrics, score.title, f"{what}: held-out (dots), training (thin)", draw_score(score),
            limits=(0, 1) if score is ACCURACY else (0, None),
        )  # fmt: skip


EPSILON = (
    Picture("epsilon", ("epsilon",), "ε", "ε so far, an upper bound, and that of the whole budget (dotted)", draw_epsilon,
            (0, None), private=True),
)  # fmt: skip
DIAGNOSTICS = (
    *scores(),
    Picture("norms", ("norm_50",), "norm / bound", "rows' gradient norms over the bound: median, and 10 to 90 % (band)",
            draw_norms),
    Picture("clipped", ("clipped",), "share of rows", "clipped rows", line("clipped"), (-0.02, 1.02)),
    Picture("rows_per_second", ("rows_per_second",), "rows per second", "throughput", line("rows_per_second"), (0, None)),
    Picture("memory_gib", ("memory_gib",), "GiB", "peak memory of a rank", line("memory_gib"), (0, None)),
    Picture("useful_rows", ("useful_rows",), "share of rows", "useful rows: those run that were no padding",
            line("useful_rows"), (0, 1.02)),
)  # fmt: skip
