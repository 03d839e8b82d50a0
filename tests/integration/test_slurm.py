"""The Slurm job on a real Slurm: two nodes on this machine (`scripts/slurm/test_cluster.sh`), two ranks on each.

Jobs are submitted, preempted, cut off by their time limit, cancelled, and lose a node; after each, the run goes on where it
was and the ledger's count is the run's.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration import slurm
from tests.integration.slurm import Job

STEPS = 200  # long enough to be preempted on the way
FOREVER = 20000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with slurm.cluster(tmp_path_factory.mktemp("cluster")) as environment:
        yield environment


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return slurm.write_text(tmp_path_factory.mktemp("texts") / "a small corpus")


def test_a_job_lets_nobody_else_in_and_is_finished_after_a_preemption(cluster, text, tmp_path: Path) -> None:
    """Two nodes of two ranks; a second job refuses their run directory; one of higher priority takes the nodes away.

    The run is finished all the same: its ε is that of as many releases as the ledger counts, within the budget.
    """
    first = Job(cluster, tmp_path / "run", [f"steps={STEPS}", *text])
    first.wait_for_steps(1)
    slurm.slurm(cluster, "scontrol", "suspend", first.number)  # it must not be done before the second has come
    second = Job(cluster, first.run, [f"steps={STEPS}", *text], ["--nodes=1", "--export=ALL,NPROC=1"])
    assert second.end() == "FAILED"
    assert "is the folder of a run that another process works on" in second.said
    slurm.slurm(cluster, "scontrol", "resume", first.number)

    slurm.preempt(cluster)
    first.wait_for("the requeue", lambda: first.facts["Restarts"] == "1")
    assert first.end() == "COMPLETED", first.said
    assert "2 nodes (n[1-2]), 2 processes each" in first.said
    assert "told to stop; the ranks save the run" in first.said and "requeued, to go on" in first.said
    # It saved before it went: nothing was lost, so nothing is counted that was not made.
    assert "going on from the checkpoint of step" in first.said
    assert f"{STEPS} releases" in slurm.verified_ledger(first.run)
    assert first.steps == STEPS
    assert 7.9 < json.loads((first.run / "metrics.jsonl").read_text().splitlines()[-1])["epsilon"] <= 8


@pytest.mark.slow
def test_a_time_limit_a_lost_node_and_a_cancellation(cluster, text, tmp_path: Path) -> None:
    """Told a minute ahead of its limit, the job requeues itself; then its second node goes down, without a word to it."""
    job = Job(cluster, tmp_path / "run", [f"steps={FOREVER}", *text], ["--time=2", "--signal=B:USR1@75"])
    job.wait_for("the requeue at its time limit", lambda: job.facts["Restarts"] == "1")
    slurm.slurm(cluster, "scontrol", "update", f"jobid={job.number}", "timelimit=30")
    before = job.steps
    job.wait_for_steps(before + 3)
    assert f"going on from the checkpoint of step {before}" in job.said  # nothing was lost

    slurm.slurm(cluster, "scontrol", "update", "nodename=n2", "state=down", "reason=test")  # it comes back by itself
    job.wait_for("the requeue without the node", lambda: job.facts["Restarts"] == "2")
    job.wait_for("the third start", lambda: job.said.count("going on from the checkpoint of step") == 2)
    before = job.steps
    job.wait_for_steps(before + 3)

    slurm.slurm(cluster, "scancel", job.number)
    assert job.end() == "CANCELLED"
    slurm.verified_ledger(job.run)
    assert job.steps < FOREVER


@pytest.mark.slow
def test_a_job_that_is_cancelled_while_it_saves_itself_does_not_come_back(cluster, text, tmp_path: Path) -> None:
    """Seen to fail (requeued and run again) when the job asks only whether it was told to stop."""
    job = Job(cluster, tmp_path / "run", [f"steps={FOREVER}", *text])
    job.wait_for_steps(3)
    slurm.slurm(cluster, "scancel", "--signal=USR1", "--batch", job.number)
    slurm.slurm(cluster, "scancel", job.number)
    assert job.end() == "CANCELLED"
    assert job.facts["Restarts"] == "0"
    slurm.verified_ledger(job.run)
