"""Faults in real processes: what a rank does to itself, and a launcher that starts ranks quickly.

As a program, `python faults.py` is the launcher: it imports the application once, then forks two ranks for every line of JSON
on its standard input, ends both when one fails, as torchrun does, and answers with a line. Under torchrun the same file is
a rank: `torchrun ... faults.py run OVERRIDES`, with the fault in the environment.

A fault is `{"point": ..., "count": n, "ranks": [...], "action": ...}`: at the n-th passage of a point in these ranks, it
takes its action. With `"workers"`, rows are read in worker processes, and passages are those of a worker.
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ANYWHERE = "anywhere"
# A rank that does not end by itself when another has failed; torchrun gives it 30 s.
GRACE_S = 30.0


# In a rank


class Saboteur:
    """Counts passages of points, and strikes at some of them."""

    def __init__(self, faults: list[dict[str, Any]], folder: Path, session: int, rank: int) -> None:
        self.faults = [fault for fault in faults if rank in fault["ranks"]]
        self.workers = max([fault.get("workers", 0) for fault in faults], default=0)
        self.folder, self.rank = folder, rank
        self.nan_next = False
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
        self.draws = (folder / f"draws-{session}-{rank}").open("ab", buffering=0)

    def due(self, point: str) -> str | None:
        """The action whose moment this is."""
        for fault in self.faults:
            if fault["point"] in (point, ANYWHERE):
                fault["count"] -= 1
                if fault["count"] == 0:
                    return str(fault["action"])
        return None

    def at(self, point: str) -> str | None:
        action = self.due(point)
        if action is not None:
            self.strike(action)
        return action

    def strike(self, action: str) -> None:
        if action == "kill all":
            for path in self.folder.glob("pid-*"):
                if path.name != f"pid-{self.rank}":
                    os.kill(int(path.read_text()), signal.SIGKILL)
        if action.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "out of memory":
            import torch

            torch.empty(2**46)  # more than there is to be had
        elif action == "unreadable":
            raise OSError(5, "Input/output error")
        elif action == "nan":
            self.nan_next = True
        elif action == "slow":
            time.sleep(3.0)
        elif action == "terminate all":
            (self.folder / "terminated").write_text(str(time.monotonic()))
            for path in self.folder.glob("pid-*"):
                os.kill(int(path.read_text()), signal.SIGTERM)
        elif action == "usr1":
            os.kill(os.getpid(), signal.SIGUSR1)
        elif action == "full disk":
            # Whatever writes this much to one file from here on fails, as on a disk without room.
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))


def install(saboteur: Saboteur) -> None:
    """Put the points into the application, and record every noise value that is drawn."""
    import torch.distributed.checkpoint as dcp

    from fsdp_dp import checkpoint, ledger, noise
    from fsdp_dp.data.packing import RowDataset
    from fsdp_dp.engine import PrivacyEngine
    from fsdp_dp.training import app, diagnostics, loop

    draw = noise.standard_normal

    def recorded(key: bytes, *, release: int, **region: Any) -> Any:
        values = draw(key, release=release, **region)
        if sys._getframe(1).f_code.co_filename.endswith("guards.py"):
            return values  # made again to look at a release; nothing is published with it
        saboteur.draws.write(
            release.to_bytes(8, "little") + values.numel().to_bytes(8, "little") + values.numpy().tobytes()
        )
        saboteur.at("draw")
        return values

    def before(owner: Any, name: str, point: str) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            saboteur.at(point)
            return original(*arguments, **keywords)

        setattr(owner, name, wrapped)

    def torn_write(file: int, data: bytes, write: Any = ledger._write_all) -> None:
        action = saboteur.due("ledger")
        if action is not None:
            half = len(data) // 2
            write(file, data[:half])
            data = data[half:]
            saboteur.strike(action)
        write(file, data)

    losses = loop.row_losses

    def with_nan(outputs: Any, targets: Any) -> Any:
        losses_B = losses(outputs, targets)
        saboteur.at("losses")
        if saboteur.nan_next:
            saboteur.nan_next = False
            losses_B = losses_B * losses_B.new_tensor([float("nan")] + [1.0] * (len(losses_B) - 1))
        return losses_B

    noise.standard_normal = recorded
    ledger._write_all = torn_write
    loop.row_losses = with_nan
    before(app, "write_config", "config")
    before(loop, "train_step", "step")
    before(PrivacyEngine, "_release", "release")
    before(dcp.FileSystemWriter, "write_data", "shards")
    before(dcp.FileSystemWriter, "finish", "metadata")
    before(checkpoint, "put_in_place", "rename")
    before(checkpoint, "finished", "renamed")
    before(checkpoint, "sync_folder", "sync")
    before(RowDataset, "__getitem__", "data")
    if hasattr(RowDataset, "__getitems__"):
        before(RowDataset, "__getitems__", "data")
    before(diagnostics.Step, "count", "microbatch")
    if saboteur.workers:
        use_workers(PrivacyEngine)


def use_workers(engine: Any) -> None:
    """Rows are read in a worker process, which is what dies then."""
    original = engine.loader

    def loader(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return original(self, *arguments, **keywords, num_workers=1)

    engine.loader = loader


def rank_main(overrides: list[str]) -> None:
    """The life of a rank: the application, sabotaged."""
    faults = json.loads(os.environ["FAULTS"])
    folder = Path(os.environ["FAULT_FOLDER"])
    install(Saboteur(faults, folder, int(os.environ["FAULT_SESSION"]), int(os.environ["RANK"])))
    sys.argv = ["fsdp_dp.train", *overrides]
    from fsdp_dp.train import main

    main()


# The launcher


def serve() -> None:
    """Start two ranks for every line, without importing anything again."""
    import prv_accountant  # noqa: F401

    import fsdp_dp.training.app
    import fsdp_dp.training.figure
    import fsdp_dp.training.metrics  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(run_ranks(task)), flush=True)


def run_ranks(task: dict[str, Any]) -> dict[str, Any]:
    """Exit codes (negative: signals) of two ranks that run the application; one that fails ends the other."""
    port = free_port()
    # Through pipes: a rank whose disk is full can still say so.
    copiers = [subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=copy_of(task, rank)) for rank in range(2)]
    pids = {fork_rank(rank, port, task, copiers): rank for rank in range(2)}
    for copier in copiers:
        assert copier.stdin is not None
        copier.stdin.close()
    codes: dict[int, int] = {}
    failed_at = None
    while len(codes) < 2:
        for waiting, rank in pids.items():
            pid, status = (0, 0) if rank in codes else os.waitpid(waiting, os.WNOHANG)
            if pid:
                codes[rank] = os.waitstatus_to_exitcode(status)
                if codes[rank] != 0 and failed_at is None:
                    failed_at = time.monotonic()
                    end_others(pids, codes, signal.SIGTERM)
        if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
            end_others(pids, codes, signal.SIGKILL)
        time.sleep(0.02)
    waited = 0.0 if failed_at is None else time.monotonic() - failed_at
    for copier in copiers:
        copier.wait(GRACE_S)
    return {"codes": [codes[0], codes[1]], "seconds_after_failure": waited}


def end_others(pids: dict[int, int], codes: dict[int, int], number: int) -> None:
    for pid, rank in pids.items():
        if rank not in codes:
            os.kill(pid, number)


def copy_of(task: dict[str, Any], rank: int) -> int:
    return os.open(task["output"].format(rank=rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def fork_rank(rank: int, port: int, task: dict[str, Any], copiers: list[subprocess.Popen[bytes]]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        pipes = [copier.stdin.fileno() for copier in copiers if copier.stdin is not None]
        os.dup2(pipes[rank], 1)
        os.dup2(pipes[rank], 2)
        for pipe in pipes:
            os.close(pipe)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        os.environ.update(rendezvous | task["environment"] | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        rank_main(task["overrides"])
        os._exit(0)
    except SystemExit as ended:
        os._exit(ended.code if isinstance(ended.code, int) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Launcher:
    """The test's side of `serve`, and of torchrun."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def start(self, overrides: list[str], environment: dict[str, str], output: str) -> dict[str, Any]:
        """Run two ranks to their end; their output is in `output`, a path with {rank} in it."""
        task = {"overrides": overrides, "environment": environment, "output": output}
        process = self._served()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, "the launcher died"
        return json.loads(answer)

    def torchrun(self, overrides: list[str], environment: dict[str, str], output: str) -> dict[str, Any]:
        """The same under torchrun, whose own exit code is the only one known."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, "run"]
        with open(output.format(rank="all"), "w") as file:
            variables = os.environ | environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*command, *overrides], cwd=ROOT, env=variables, stdout=file, stderr=file, timeout=300, check=False
            )
        return {"codes": [done.returncode]}

    def _served(self) -> subprocess.Popen[str]:
        if self._process is None:
            pipe = subprocess.PIPE
            variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            command = [sys.executable, __file__, "serve"]
            self._process = subprocess.Popen(command, cwd=ROOT, env=variables, stdin=pipe, stdout=pipe, text=True)
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == "ready\n"
        return self._process

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                stream.close()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        rank_main(sys.argv[2:])
