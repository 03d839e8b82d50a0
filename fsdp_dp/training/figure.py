"""The picture of a run: loss and ε over its steps."""

from __future__ import annotations

from pathlib import Path

from fsdp_dp.training.metrics import RunLog


def draw(log: RunLog, baseline: float, path: Path) -> None:
    """Write a PNG: the score above (training, held-out, frequencies alone), ε below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    score, diagnostics = log.score, bool(log.series(f"training_{log.score.name}")[0])
    figure, (loss, epsilon) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    if diagnostics:
        loss.plot(
            *log.series(f"training_{score.name}"), label="training (un-noised: outside the guarantee)", linewidth=1
        )
        loss.plot(*log.series(f"held_out_{score.name}"), label="held-out (outside the guarantee)", marker="o")
        loss.axhline(baseline, label=f"held-out, {score.baseline}", color="gray", linestyle="--")
        loss.legend()
    else:
        loss.text(0.5, 0.5, "diagnostics=false: not recorded", ha="center", va="center", transform=loss.transAxes)
    loss.set_ylabel(score.title)
    steps, epsilons = log.series("epsilon")
    if steps:
        epsilon.plot(steps, epsilons, drawstyle="steps-post", color="tab:red")
    else:
        epsilon.text(0.5, 0.5, "not private: no ε", ha="center", va="center", transform=epsilon.transAxes)
    epsilon.set_ylabel("ε (upper bound)")
    epsilon.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
