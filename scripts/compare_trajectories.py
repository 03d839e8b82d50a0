"""One run under every strategy, on 1, 2 and 4 processes: the same trajectory, noise included, to rounding.

    python scripts/compare_trajectories.py [--steps 40] [--folder DIR]

Trains the tiny decoder of `python -m fsdp_dp.train` on CPUs from one seed for weights, draws and noise (`privacy.seed`, which
is for tests: it voids the guarantee), once for each strategy and number of processes, and writes
docs/figures/trajectories.png: the training loss of all runs, and how far each is from the run on one process. Prints the
largest difference of each run. What is in DIR already is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs" / "figures" / "trajectories.png"
ALONE = (1, "full_shard")
STRATEGIES = {
    2: ("full_shard", "shard_grad_op", "no_shard", "fully_shard", "ddp", "zero1", "tensor_parallel"),
    4: (
        *("full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "hybrid_shard_zero2"),
        *("fully_shard", "hybrid_shard_fsdp2", "ddp", "zero1", "tensor_parallel"),
    ),
}
RUNS = (ALONE, *((size, strategy) for size, strategies in STRATEGIES.items() for strategy in strategies))
OPTIONS = (
    *("privacy.seed=7", "seed=7", "batch_size=64", "optimizer.warmup_steps=5", "device=cpu"),
    *("evaluate_every=1000", "evaluate_rows=64", "checkpoint_every=1000"),
)


def train(folder: Path, size: int, strategy: str, steps: int) -> None:
    """The run, unless it is there. A microbatch has the same rows in all, so that ranks only share them out."""
    run = folder / f"{strategy}_{size}"
    if (run / "report.md").exists():
        return
    options = [*OPTIONS, f"steps={steps}", f"sharding={strategy}", f"output_dir={run}"]
    tensor = 2 if strategy == "tensor_parallel" else 1
    options += [f"microbatch_size={32 * tensor // size}"]
    options += [f"sharding.tensor_parallel_size={tensor}"] if tensor > 1 else []
    options += ["sharding.replicate_size=2"] if strategy.startswith("hybrid") else []
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    subprocess.run([*torchrun, "-m", "fsdp_dp.train", *options], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def losses(folder: Path, size: int, strategy: str) -> list[float]:
    """Training loss of every step, in bits per byte."""
    lines = (folder / f"{strategy}_{size}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = (json.loads(line).get("outside_the_guarantee", {}) for line in lines)
    return [metrics["training_bits_per_byte"] for metrics in found if "training_bits_per_byte" in metrics]


def draw(found: dict[tuple[int, str], list[float]]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    alone = found[ALONE]
    steps = range(1, len(alone) + 1)
    for (size, strategy), run in found.items():
        left.plot(steps, run, linewidth=1)
        if (size, strategy) != ALONE:
            off = [max(abs(a / b - 1), 1e-9) for a, b in zip(run, alone, strict=True)]
            right.semilogy(steps, off, linewidth=1, label=f"{strategy}, {size}")
    left.set(xlabel="release", ylabel="training loss (bits per byte)", title=f"{len(found)} runs in one picture")
    right.set(xlabel="release", title="relative difference from one process, fp32", ylim=(1e-9, 1e-1))
    right.legend(fontsize=6, ncols=3)
    figure.savefig(FIGURE, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "trajectories")
    options = parser.parse_args()
    for size, strategy in RUNS:
        train(options.folder, size, strategy, options.steps)
    found = {run: losses(options.folder, *run) for run in RUNS}
    for (size, strategy), run in found.items():
        off = max(abs(a / b - 1) for a, b in zip(run, found[ALONE], strict=True))
        print(f"{strategy:20} {size} processes: loss {run[0]:.4f} to {run[-1]:.4f}, largest difference {off:.1e}")
    draw(found)


if __name__ == "__main__":
    main()
