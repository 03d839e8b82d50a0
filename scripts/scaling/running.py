"""Starts torchrun, watches what comes of it, and says in one line what went wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


class TimeIsUp(Exception):
    """The time that one may take is over; what was measured is kept."""


def describe_host(device: str) -> dict[str, Any]:
    """Number of GPUs, their name and memory. Asked in a process of its own: CUDA would take memory of the first GPU here."""
    if device == "cpu":
        return {"gpus": os.cpu_count() or 1, "name": "CPU", "GiB": 0.0}
    ask = (
        "import json, torch; c = torch.cuda; p = [c.get_device_properties(i) for i in range(c.device_count())]; "
        "print(json.dumps({'gpus': len(p), 'name': p[0].name, 'GiB': p[0].total_memory / 2**30} if p else None))"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    if found is None:
        raise SystemExit("scaling: torch finds no GPU here; `--device cpu` tries everything on CPUs with a tiny model.")
    return found


def torchrun(
    gpus: int,
    arguments: Sequence[str],
    *,
    cpu: bool,
    log: Path,
    tick: Callable[[], bool],
    patience: float,
    deadline: float,
) -> str:
    """Run to the end: "" where all went well, else the reason.

    ``tick`` is called all the time, and says whether there was progress. Without any for ``patience`` seconds, all ranks
    are ended: a rank that waits in a collective for one that is gone would wait forever.

    Raises:
        TimeIsUp: at ``deadline`` (`time.monotonic`), all ranks ended.
    """
    command = [*TORCHRUN, f"--nproc-per-node={gpus}", *arguments]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if cpu else {}
    with log.open("a", encoding="utf-8") as file:
        print("$ torchrun", *command[2:], file=file, flush=True)
        start = file.tell()
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            late = _watch(process, tick, patience, deadline)
        finally:
            _end(process)
    tick()
    if late:
        return late
    return reason(log.read_bytes()[start:].decode(errors="replace"), process.returncode) if process.returncode else ""


def _watch(process: subprocess.Popen[bytes], tick: Callable[[], bool], patience: float, deadline: float) -> str:
    moved = time.monotonic()
    while process.poll() is None:
        time.sleep(0.5)
        now = time.monotonic()
        moved = now if tick() else moved
        if now > deadline:
            raise TimeIsUp
        if now - moved > patience:
            return f"no progress for {patience:.0f} s"
    return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """torchrun and its ranks, which it ends when it is told to."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def reason(log: str, code: int) -> str:
    """The first error that a rank told, without torchrun's own report."""
    for text in log.splitlines():
        found = re.search(r"(?:^|\]:)\s*((?:\w+\.)*\w*(?:Error|Exception|SystemExit): .+)", text)
        if found and "ChildFailedError" not in text:
            return found[1][:300]
    return f"exit code {code} without an error; see the log"
