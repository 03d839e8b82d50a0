"""The Slurm job on a real Slurm: two nodes on this machine (`scripts/slurm/test_cluster.sh`), two ranks on each.

Jobs are submitted, preempted, cut off by their time limit, cancelled, and lose a node; after each, the run goes on where it
was and the ledger's count is the run's.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLUSTER, JOB = ROOT / "scripts/slurm/test_cluster.sh", ROOT / "scripts/slurm/train.sbatch"
LONG = 4000  # steps
SECONDS = 180.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.getuid() != 0 or not (shutil.which("slurmctld") or shutil.which("apt-get")),
        reason="a Slurm cluster of one's own needs root, and slurm-wlm installed or apt-get to install it with",
    ),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands find a cluster of the test's own."""
    folder = tmp_path_factory.mktemp("cluster")
    environment = {**os.environ, "FSDP_DP_TEST_CLUSTER": str(folder)}
    said = subprocess.run([CLUSTER, "start"], env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    environment["SLURM_CONF"] = re.fullmatch(r"export SLURM_CONF=(\S+)\n", said.stdout)[1]
    environment |= {"NPROC": "2", "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    yield environment
    subprocess.run([CLUSTER, "stop"], env=environment, check=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(8):
        (folder / f"{i}.txt").write_text("".join(f"{i} and {j} make {i + j}.\n" for j in range(400)))
    return folder


class Job:
    """One submitted job and the run directory that it writes."""

    def __init__(
        self, cluster: dict[str, str], text: Path, folder: Path, *, steps: int, options: Sequence[str] = ()
    ) -> None:
        self.cluster, self.folder, self.log = cluster, folder, folder.with_suffix(".log")
        sizes = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=2", "--partition=low", f"--output={self.log}")
        run = (
            f"steps={steps}", "batch_size=8", "microbatch_size=4", "model.block_size=16", "evaluate_rows=4",
            "evaluate_every=100000", "checkpoint_every=10", "data=text_files", f"data.path='{text}/*.txt'",
            f"output_dir={folder}",
        )  # fmt: skip
        self.number = self.slurm("sbatch", "--parsable", *sizes, *options, str(JOB), *run).strip()

    def slurm(self, *command: str) -> str:
        done = subprocess.run(command, env=self.cluster, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    @property
    def facts(self) -> dict[str, str]:
        shown = self.slurm("scontrol", "--oneliner", "show", "job", self.number)
        return dict(pair.partition("=")[::2] for pair in shown.split() if "=" in pair)

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def steps(self) -> int:
        """The last step that the run has logged."""
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return max((json.loads(line).get("step", 0) for line in lines if line.endswith("}")), default=0)

    def wait_for(self, what: str, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < deadline, f"job {self.number} did not come to: {what}\n{self.facts}\n{self.said}"
            time.sleep(0.3)

    def wait_for_steps(self, count: int) -> None:
        self.wait_for(f"{count} steps", lambda: self.steps >= count)

    def end(self) -> str:
        """The state in which it ends."""
        self.wait_for("an end", lambda: self.facts["JobState"] in ENDED)
        return self.facts["JobState"]

    def verified_ledger(self) -> str:
        command = [sys.executable, "-m", "fsdp_dp.ledger", "verify", str(self.folder)]
        done = subprocess.run(command, env=self.cluster, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def assert_complete(self, steps: int) -> None:
        """It ran to the end of its budget: every release is in the ledger, and none beyond it."""
        assert self.end() == "COMPLETED", self.said
        assert f"{steps} steps" in self.said
        self.verified_ledger()
        assert self.steps == steps


def test_a_preempted_job_saves_itself_and_goes_on(cluster: dict[str, str], text: Path, tmp_path: Path) -> None:
    """Two nodes of two ranks; a job of higher priority takes both nodes away, and the run is finished all the same."""
    job = Job(cluster, text, tmp_path / "run", steps=40)
    job.wait_for_steps(3)
    job.slurm(
        "sbatch", "--partition=high", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 1"
    )
    job.wait_for("a requeue", lambda: job.facts["Restarts"] == "1")
    job.assert_complete(40)
    assert "2 nodes (n[1-2]), 2 processes each" in job.said
    assert "told to stop; the ranks save the run" in job.said and "requeued, to go on" in job.said
    # It saved before it went: nothing was lost, so nothing is counted that was not made.
    assert "going on from the checkpoint of step" in job.said
    assert "40 releases" in job.verified_ledger()


def test_a_time_limit_and_a_lost_node(cluster: dict[str, str], text: Path, tmp_path: Path) -> None:
    """Told a minute ahead of its limit, the job requeues itself; then its second node goes down, without a word to it."""
    job = Job(cluster, text, tmp_path / "run", steps=LONG, options=("--time=2", "--signal=B:USR1@75"))
    job.wait_for("a requeue at its time limit", lambda: job.facts["Restarts"] == "1")
    job.slurm("scontrol", "update", f"jobid={job.number}", "timelimit=30")
    before = job.steps
    job.wait_for_steps(before + 3)
    job.slurm("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    job.wait_for("a requeue without the node", lambda: job.facts["Restarts"] == "2")
    job.slurm("scontrol", "update", "nodename=n2", "state=resume")
    job.wait_for("its third start", lambda: job.said.count("going on from the checkpoint of step") == 2)
    job.slurm("scancel", job.number)
    assert job.end() == "CANCELLED"
    job.verified_ledger()


def test_a_second_job_on_one_run_directory_refuses(cluster: dict[str, str], text: Path, tmp_path: Path) -> None:
    first = Job(cluster, text, tmp_path / "run", steps=LONG, options=("--nodes=1",))
    first.wait_for_steps(1)
    log = tmp_path / "second.log"
    second = Job(cluster, text, tmp_path / "run", steps=LONG, options=("--nodes=1", f"--output={log}"))
    assert second.end() == "FAILED"
    assert "another process" in log.read_text()
    assert first.facts["JobState"] == "RUNNING"
    first.slurm("scancel", first.number)
    assert first.end() == "CANCELLED"
    first.verified_ledger()
