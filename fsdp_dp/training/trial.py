"""A trial that submitit started: torchrun on each node of its job, and the requeue that goes with it.

`python -m fsdp_dp.train -m hydra/launcher=submitit_slurm ...` has submitit submit one job for each trial; on each node of it
one task calls `run_trial`. It starts torchrun, whose ranks get the configuration as it was composed, by this module's own
`main`. When Slurm warns the job, the ranks save the run, and only then does submitit requeue the job.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fsdp_dp.training.config_errors import explain

# Ranks that are still starting ignore a warning: they are told again after so many seconds.
SECONDS_BETWEEN_WARNINGS = 0.5
PROCESSES_WITHOUT_GPUS = 2


class TrialError(RuntimeError):
    """The ranks of a trial failed."""


def is_task() -> bool:
    """Whether submitit started this process: not torchrun, which a task starts in turn."""
    return "SUBMITIT_EXECUTOR" in os.environ and "RANK" not in os.environ


def run_trial(config: DictConfig, check: Callable[[DictConfig, int], object]) -> None:
    """Train, on all nodes of this job; returns when the run is complete. Every task of the job calls it.

    `check` raises what is wrong with a configuration, for so many processes.

    Raises:
        ValueError: the configuration is not allowed, in which case nothing is started.
        TrialError: a rank failed.
    """
    import submitit

    job = submitit.JobEnvironment()
    if job.num_tasks != job.num_nodes:
        raise ValueError(
            f"hydra.launcher.tasks_per_node must be 1, found {job.num_tasks} tasks on {job.num_nodes} nodes: torchrun starts "
            "the processes of a node, as many as it has GPUs (hydra.launcher.gpus_per_node), or as NPROC says"
        )
    config = cast(DictConfig, OmegaConf.merge(config, {"resume": True}))  # after a requeue, the run is there
    try:
        check(config, job.num_nodes * processes())
    except (ValueError, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from None
    composed = json.dumps(OmegaConf.to_container(config, resolve=True))
    status, warned = supervise(
        [sys.executable, "-m", "fsdp_dp.launch", *torchrun_options(job), "-m", "fsdp_dp.training.trial", composed]
    )
    if status and warned:
        sys.exit(os.EX_TEMPFAIL)  # a task of another node: the first one's has requeued the job
    if status:
        raise TrialError(
            f"a trial failed: {job.paths.stdout} says why. Its releases count all the same, and the other trials go on: "
            f"`python -m fsdp_dp.sweep cost {Path(config.output_dir).parent}/*/` says what they cost together"
        )


def processes() -> int:
    """Of each node: NPROC, else one for each GPU that the job has there, else 2."""
    for number in (os.environ.get("NPROC"), os.environ.get("SLURM_GPUS_ON_NODE")):
        if number:
            return int(number)
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    return len(visible) or PROCESSES_WITHOUT_GPUS


def torchrun_options(job: Any) -> list[str]:
    """Where the nodes meet, and how many processes each has; as in scripts/slurm/train.sbatch."""
    options = [f"--nnodes={job.num_nodes}", f"--nproc-per-node={processes()}", "--rdzv-backend=c10d"]
    if job.num_nodes == 1:
        return [*options, "--rdzv-endpoint=localhost:0", f"--rdzv-id={job.job_id}"]
    number, start = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    # srun was called on the first node. Its address need not be what that node's name stands for there.
    host = os.environ.get("SLURM_LAUNCH_NODE_IPADDR") or job.hostnames[0]
    return [
        *options,
        f"--rdzv-endpoint={host}:{20000 + (number * 7 + start) % 12000}",
        f"--rdzv-id={number}.{start}",
        f"--rdzv-conf=is_host={int(job.global_rank == 0)}",
    ]


def supervise(command: list[str]) -> tuple[int, bool]:
    """Run a torchrun to its end: (status, whether the job was warned); where warned, the requeue comes after that end."""
    number = signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]
    requeue = signal.getsignal(number)
    warning: list[int] = []
    signal.signal(number, lambda number, _: warning.append(number))
    # Slurm signals every process of the job; torchrun would die of it, and so would ranks that are still starting.
    torchrun = subprocess.Popen(command, preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
    try:
        status = watched(torchrun, lambda: bool(warning))
    finally:
        torchrun.terminate()
        signal.signal(number, requeue)
    if status and warning and callable(requeue):
        requeue(number, None)  # submitit's own: it does not return on the first node
    return status, bool(warning)


def watched(torchrun: subprocess.Popen[bytes], is_warned: Callable[[], bool]) -> int:
    """The exit status, when it comes; the ranks are told of a warning until then."""
    while True:
        try:
            return torchrun.wait(timeout=SECONDS_BETWEEN_WARNINGS)
        except subprocess.TimeoutExpired:
            for rank in children(torchrun.pid) if is_warned() else ():
                os.kill(rank, signal.SIGUSR1)


def children(parent: int) -> list[int]:
    """The processes that `parent` started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (name) state ppid ...; the name may hold anything.
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it is gone
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def main() -> None:
    """A rank: trains the configuration on its command line."""
    from fsdp_dp.train import run_job

    config = OmegaConf.create(json.loads(sys.argv[1]))
    assert isinstance(config, DictConfig)
    run_job(config)


if __name__ == "__main__":
    main()
