"""The torchtitan example: its own trainer, FSDP2 and checkpoints, on two ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.slurm import ROOT, verified_ledger

pytest.importorskip("torchtitan", reason="needs torchtitan: pip install 'torchtitan>=0.2,<0.3'")

EXAMPLE = ROOT / "scripts/examples/torchtitan_trainer.py"
# torchtitan starts only where there is an accelerator, and asks it for its memory: here the CPU passes for one.
ON_CPU = f"""
import runpy, torch, torch._utils
torch._utils._get_available_device_type = lambda: "cpu"
torch.cpu.current_device = lambda: 0
from torchtitan.components import metrics

class Memory:
    device_name = "cpu"
    def get_peak_stats(self):
        return metrics.DeviceMemStats(*[0.0] * len(metrics.DeviceMemStats._fields))
    def reset_peak_stats(self):
        pass

metrics.build_device_memory_monitor = Memory
runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")
"""
OPTIONS = (
    "--model.name=private_llama3", "--model.flavor=debugmodel", "--training.steps=3", "--training.local_batch_size=4",
    "--training.global_batch_size=16", "--training.seq_len=16", "--metrics.log_freq=1", "--metrics.enable_tensorboard",
    "--checkpoint.enable", "--checkpoint.interval=1",
)  # fmt: skip


def train(folder: Path, *options: str) -> str:
    """What it printed."""
    (folder / "on_cpu.py").write_text(ON_CPU)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [*torchrun, str(folder / "on_cpu.py"), *OPTIONS, f"--job.dump_folder={folder}", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_torchtitan_trains_privately_and_counts_what_was_released(tmp_path: Path) -> None:
    """The step after the checkpoint was released already: made again, it would be another release, and none is left."""
    out = train(tmp_path)
    assert "Applied FSDP to the model" in out and "step:  3" in out
    assert "3 releases" in verified_ledger(tmp_path)
    out = train(tmp_path, "--checkpoint.load_step=2")
    assert "Training starts at step 3" in out and "Ran out of data" in out
    assert "3 releases" in verified_ledger(tmp_path)
