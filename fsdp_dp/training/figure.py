"""The picture of a run: loss and ε over its steps."""

from __future__ import annotations

from pathlib import Path

from fsdp_dp.training.metrics import RunLog


def draw(log: RunLog, unigram_bits: float, path: Path) -> None:
    """Write a PNG: bits per byte above (training, held-out, byte frequencies alone), ε below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss, epsilon) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    loss.plot(*log.series("training_bits_per_byte"), label="training (un-noised: outside the guarantee)", linewidth=1)
    loss.plot(*log.series("held_out_bits_per_byte"), label="held-out", marker="o")
    loss.axhline(unigram_bits, label="held-out, byte frequencies alone", color="gray", linestyle="--")
    loss.set_ylabel("bits per byte")
    loss.legend()
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
