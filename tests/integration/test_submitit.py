"""Sweeps by submitit: each trial is a job of its own with torchrun in it; at the end stands what they cost together."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fsdp_dp.training.trial import children
from tests.integration import slurm
from tests.integration.slurm import ROOT, SMALL

pytest.importorskip(
    "hydra_plugins.hydra_submitit_launcher", reason="needs hydra-submitit-launcher: pip install '.[slurm]'"
)


class Sweep:
    """`fsdp_dp.train -m` in a folder of its own."""

    def __init__(self, folder: Path, environment: dict[str, str], launcher: str, *overrides: str) -> None:
        self.folder = folder
        text = slurm.write_text(folder / "a corpus")
        command = [sys.executable, "-m", "fsdp_dp.train", "-m", f"hydra/launcher={launcher}", *SMALL, *text, *overrides]
        environment = {**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)

    def end(self) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        try:
            out, err = self.process.communicate(timeout=slurm.SECONDS)
        finally:
            self.process.kill()
        return self.process.returncode, out, err

    @property
    def runs(self) -> list[Path]:
        """The run directories, once they have a run."""
        return sorted(path.parent for path in self.folder.glob("outputs/multirun/*/*/config.yaml"))

    @property
    def said(self) -> str:
        return "\n".join(path.read_text() for path in self.folder.glob("outputs/multirun/*/.submitit/*/*.out"))

    def assert_complete(self, steps: int) -> None:
        """All trials ran to their end, and the sweep stated the cost of both."""
        code, out, err = self.end()
        assert code == 0, err + self.said
        assert [slurm.steps_of(run) for run in self.runs] == [steps, steps]
        assert all(f"{steps} releases" in slurm.verified_ledger(run) for run in self.runs)
        alone = [float(epsilon) for epsilon in re.findall(r"epsilon = ([\d.]+) alone", out)]
        together = float(re.findall(r"together: epsilon <= ([\d.]+) at delta", out)[0])
        assert len(alone) == 2 and max(alone) <= 8 < together < sum(alone)


def test_a_sweep_of_two_trials_on_this_machine(tmp_path: Path) -> None:
    """They are warned on the way, as ahead of a time limit: submitit starts them again, and they go on."""
    environment = {**os.environ, "NPROC": "1"}
    sweep = Sweep(tmp_path, environment, "submitit_local", "steps=150", "optimizer.learning_rate=1e-3,1e-2")
    slurm.wait_for("the first run", lambda: bool(sweep.runs), lambda: sweep.said)
    controllers = {int(log.parent.name) for log in tmp_path.glob("outputs/multirun/*/.submitit/*/*.out")}
    for task in (task for controller in controllers for task in children(controller)):
        os.kill(task, signal.SIGUSR2)
    sweep.assert_complete(150)
    assert "going on from the checkpoint of step" in sweep.said


@pytest.mark.slow
def test_a_sweep_of_two_trials_on_slurm(tmp_path: Path) -> None:
    """Each on two nodes of two ranks. They are preempted, save themselves, are queued again, and go on."""
    with slurm.cluster(tmp_path / "cluster") as environment:
        sizes = [f"hydra.launcher.{size}" for size in ("nodes=2", "gpus_per_node=0", "cpus_per_task=2")]
        overrides = ("steps=300", "optimizer.learning_rate=1e-3,1e-2", *sizes, "hydra.launcher.partition=low")
        sweep = Sweep(tmp_path / "sweep", environment, "submitit_slurm", *overrides)
        slurm.wait_for("two runs", lambda: len(sweep.runs) == 2, lambda: sweep.said)
        slurm.preempt(environment)
        sweep.assert_complete(300)
        assert "going on from the checkpoint of step" in sweep.said
