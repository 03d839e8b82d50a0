"""A Slurm of the tests' own, two nodes on this machine (`scripts/slurm/test_cluster.sh`), and jobs on it."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLUSTER, JOB = ROOT / "scripts/slurm/test_cluster.sh", ROOT / "scripts/slurm/train.sbatch"
IMPOSSIBLE = 77  # test_cluster.sh: no root, or no Slurm and no way to install it
SECONDS = 240.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
# As small as a run can be: what takes time is starting six processes.
SMALL = (
    "device=cpu", "batch_size=8", "microbatch_size=4", "evaluate_rows=4", "evaluate_every=100000", "checkpoint_every=10",
    "model.layers=1", "model.width=16", "model.mlp_width=24", "model.heads=2", "model.block_size=16", "data=text_files",
)  # fmt: skip


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands find a cluster made for the occasion; skips where there can be none."""
    environment = {**os.environ, "FSDP_DP_TEST_CLUSTER": str(folder), "FSDP_DP_TEST_CLUSTER_PORT": str(free_ports(3))}
    started = subprocess.run([CLUSTER, "start"], env=environment, capture_output=True, text=True, check=False)
    if started.returncode == IMPOSSIBLE:
        pytest.skip(started.stderr.strip().splitlines()[-1])
    try:
        assert started.returncode == 0, started.stderr
        environment["SLURM_CONF"] = re.fullmatch(r"export SLURM_CONF=(\S+)\n", started.stdout)[1]
        environment |= {"NPROC": "2", "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        yield environment
    finally:
        subprocess.run([CLUSTER, "stop"], env=environment, check=True)


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row, below those that the system gives out."""
    for first in range(26817 + os.getpid() % 500 * count, 32000, count):
        with ExitStack() as opened:
            try:
                for port in range(first, first + count):
                    opened.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
            return first
    raise AssertionError(f"no {count} free ports in a row")


def write_text(folder: Path) -> list[str]:
    """A small corpus, and the override that reads it."""
    folder.mkdir(parents=True)
    for i in range(8):
        (folder / f"{i}.txt").write_text("".join(f"{i} and {j} make {i + j}.\n" for j in range(400)))
    return [f"data.path='{folder}/*.txt'"]


def steps_of(run: Path) -> int:
    """The last step that a run has logged."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines if line.endswith("}")), default=0)


def verified_ledger(run: Path) -> str:
    """What `fsdp_dp.ledger verify` says of a run, which must be in order."""
    command = [sys.executable, "-m", "fsdp_dp.ledger", "verify", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_for(what: str, holds: Callable[[], bool], explain: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come in {SECONDS:.0f} s\n{explain()}"
        time.sleep(0.3)


class Job:
    """One submission of `train.sbatch`, and the run directory that it writes."""

    def __init__(
        self, cluster: dict[str, str], run: Path, overrides: Sequence[str], options: Sequence[str] = ()
    ) -> None:
        self.cluster, self.run = cluster, run
        self.log = run.with_name(f"{run.name}-{time.monotonic_ns()}.log")
        sizes = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=2", "--partition=low", f"--output={self.log}")
        command = ("sbatch", "--parsable", *sizes, *options, str(JOB), *SMALL, f"output_dir='{run}'", *overrides)
        self.number = slurm(cluster, *command).strip()

    @property
    def facts(self) -> dict[str, str]:
        shown = slurm(self.cluster, "scontrol", "--oneliner", "show", "job", self.number)
        return dict(pair.partition("=")[::2] for pair in shown.split() if "=" in pair)

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def steps(self) -> int:
        return steps_of(self.run)

    def wait_for(self, what: str, holds: Callable[[], bool]) -> None:
        """Wait while the job is there; one that has ended will not come to it."""

        def is_so() -> bool:
            ended = self.facts["JobState"] in ENDED  # asked for before, since what it did last counts
            assert holds() or not ended, f"job {self.number} ended before {what}\n{self.facts}\n{self.said}"
            return holds()

        wait_for(f"{what} of job {self.number}", is_so, lambda: f"{self.facts}\n{self.said}")

    def wait_for_steps(self, count: int) -> None:
        self.wait_for(f"step {count}", lambda: self.steps >= count)

    def end(self) -> str:
        """The state in which it ends."""
        self.wait_for("the end", lambda: self.facts["JobState"] in ENDED)
        return self.facts["JobState"]


def slurm(cluster: dict[str, str], *command: str) -> str:
    """The output of one of Slurm's commands, which must succeed."""
    done = subprocess.run(command, env=cluster, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def preempt(cluster: dict[str, str]) -> None:
    """A job of higher priority that wants both nodes for a second."""
    options = ("--partition=high", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null")
    slurm(cluster, "sbatch", *options, "--wrap=sleep 1")
