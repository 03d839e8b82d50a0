"""What a task of submitit's does around torchrun, and what Hydra says of the launchers."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fsdp_dp import train
from fsdp_dp.accounting import epsilon
from fsdp_dp.training import launchers, trial
from fsdp_dp.training.multirun import summary
from fsdp_dp.training.run_folder import CONFIG_FILE
from tests.unit.test_report import make_run

ROOT = Path(__file__).resolve().parents[2]
# A process with one of its own, as torchrun has ranks: that one ends when it is told.
RANK = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); time.sleep(15)"
TORCHRUN = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {RANK!r}]).returncode)"


def test_the_requeue_comes_after_the_ranks_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail when the warning goes to submitit's handler at once, as it would without `supervise`."""
    requeued, others = [], trial.children(os.getpid())  # of other tests, which share this process
    before = signal.signal(signal.SIGUSR2, lambda number, _: requeued.append(trial.children(os.getpid())))
    try:
        threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        status, warned = trial.supervise([sys.executable, "-c", TORCHRUN])
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (status, warned) == (75, True)
    assert requeued == [others]  # once, with no torchrun left


def test_the_requeue_is_submitits_alone() -> None:
    """A torchrun that fails by itself is not started again."""
    assert trial.supervise([sys.executable, "-c", "raise SystemExit(3)"]) == (3, False)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, 2),
        ({"SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, 3),
        ({"NPROC": "1", "SLURM_GPUS_ON_NODE": "8"}, 1),
    ],
)
def test_a_process_for_each_gpu(variables: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NPROC", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert trial.processes() == expected


def test_two_tasks_on_a_node_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    for name, value in {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"tasks_per_node must be 1, found 2 tasks on 1 nodes"):
        trial.run_trial(OmegaConf.create({}), lambda *_: None)


def test_the_launchers_have_sizes_of_a_training_run() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    train.store_schema()
    launchers.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = ["hydra/launcher=submitit_slurm", "hydra.launcher.nodes=2"]
        launcher = compose("config", overrides, return_hydra_config=True).hydra.launcher
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (2, 1, 8)
    assert launcher.max_num_timeout > 0  # the plugin's own default gives up at the first time limit


def refusal(*overrides: str) -> str:
    command = [sys.executable, "-m", "fsdp_dp.train", "-m", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    return done.stderr


def test_a_launcher_that_is_not_there() -> None:
    assert "pip install 'fsdp_dp[slurm]'" in refusal("hydra/launcher=submitit_slurmm")


def test_an_option_that_the_launcher_lacks() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    said = refusal("hydra/launcher=submitit_slurm", "hydra.launcher.gpus=1")
    assert "hydra.launcher.gpus: no such option" in said and "--cfg hydra --package hydra.launcher" in said


def test_a_sweep_counts_every_run_below_it(tmp_path: Path) -> None:
    """Seen to fail: runs whose subdirs lie deeper were left out of the sum, and so was a ledger without a configuration."""
    for name in ("0", "lr=1/2"):
        make_run(tmp_path / name)
    first, *lines = summary(tmp_path)
    assert first.startswith("the 2 runs in")
    expected = epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=8, delta=1e-6).upper
    assert any(line.startswith(f"together: epsilon <= {expected:.6g}") for line in lines)
    (tmp_path / "lr=1" / "2" / CONFIG_FILE).unlink()
    assert "no cost of all together can be stated" in summary(tmp_path)[0]


def test_a_sweep_whose_runs_are_elsewhere_says_so(tmp_path: Path) -> None:
    assert "`python -m fsdp_dp.sweep cost RUN...`" in summary(tmp_path)[0]
