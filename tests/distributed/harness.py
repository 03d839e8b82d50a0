"""Runs one function on several gloo ranks and brings back what each returned, or the first failure with its rank.

    def check(rank, world_size, dtype):     # a module-level function: ranks import it by name
        ...
        return something_that_pickles

    results = run(check, 2, torch.float64)  # results[rank]

Ranks come from a fork server that has imported torch and nothing else: as quick as fork, and as clean as spawn (a plain
fork of the test process would inherit autograd and OpenMP threads, which then hang).
"""

import contextlib
import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection, context, get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
# After the timeout, for ranks to write where they stand.
GRACE_S = 1.0
# After a failure, for its echo in other ranks.
ECHO_S = 0.1


class RankFailure(Exception):
    """What went wrong on `rank`. `exception` is the rank's own where it could be pickled, else None."""

    def __init__(self, message: str, rank: int, exception: BaseException | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.exception = exception


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one rank sends back, once. It pickles `value` and `exception` itself, so that its errors are its own."""

    value: bytes | None = None
    traceback: str | None = None
    exception: bytes | None = None
    at: float = field(default_factory=time.monotonic)  # one clock for all processes of a machine


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The parent's side of one process."""

    index: int
    process: context.ForkServerProcess
    pipe: connection.Connection
    stack_file: Path

    def describe_end(self) -> str:
        """Why a process that sent nothing is gone."""
        self.process.join(GRACE_S)
        code = self.process.exitcode
        name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return f"ended without an answer ({name})\n{self.stack()}"

    def stack(self) -> str:
        """Where the rank stood when it crashed or when the time was up."""
        return self.stack_file.read_text() if self.stack_file.exists() else ""


def run(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, backend: str = "gloo"
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on `world_size` ranks and return their values in rank order.

    Each rank has one torch thread, a default process group and the warning filters of the caller; with another backend than
    gloo ("cpu:gloo,cuda:nccl"), also a GPU of its own.

    Raises:
        RankFailure: on the first rank that raised or died, with its traceback, or when `timeout` seconds have passed,
            with the stack of every rank that had not answered. All ranks are ended before it is raised.
    """
    # Plain pickle, both ways: multiprocessing's own sends tensors as handles that die with their sender.
    task = pickle.dumps((fn, args))
    filters = [_plain_filter(*entry) for entry in warnings.filters]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        ranks = [
            _start(index, world_size, Path(directory, f"rank{index}"), store.port, timeout, task, filters, backend)
            for index in range(world_size)
        ]
        try:
            return _collect(ranks, timeout)
        finally:
            _end(ranks)


def _start(
    index: int,
    world_size: int,
    stack_file: Path,
    port: int,
    timeout: float,
    task: bytes,
    filters: list[tuple[Any, ...]],
    backend: str,
) -> Rank:
    server = get_context("forkserver")
    server.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"])
    receiver, sender = server.Pipe(duplex=False)
    process = server.Process(
        target=_rank_main,
        args=(index, world_size, port, str(stack_file), timeout, task, filters, backend, sender),
        name=f"rank {index}",
        daemon=True,
    )
    process.start()
    sender.close()  # so that the pipe ends when the rank does
    return Rank(index=index, process=process, pipe=receiver, stack_file=stack_file)


def _collect(ranks: Sequence[Rank], timeout: float) -> list[Any]:
    """Wait for every rank's answer; raise at the first failure."""
    values: dict[int, Any] = {}
    deadline = time.monotonic() + timeout + GRACE_S
    while waiting := [rank for rank in ranks if rank.index not in values]:
        answers = _receive(waiting, deadline - time.monotonic())
        if not answers:
            raise _late(waiting, timeout)
        if any(answer is None or answer.value is None for answer in answers.values()):
            # One rank's failure breaks its peers' connections: hear them for a moment, then name the one that began it.
            answers |= _receive([rank for rank in waiting if rank.index not in answers], ECHO_S)
            raise _first_failure(ranks, answers)
        values |= {index: pickle.loads(answer.value) for index, answer in answers.items()}
    return [values[rank.index] for rank in ranks]


def _receive(ranks: Sequence[Rank], timeout: float) -> dict[int, Answer | None]:
    """The answers that have come by the time the first one has; None from a rank that died silently."""
    ready = connection.wait([rank.pipe for rank in ranks], max(timeout, 0.0))
    answers: dict[int, Answer | None] = {}
    for rank in ranks:
        if rank.pipe in ready:
            try:
                answers[rank.index] = rank.pipe.recv()
            except EOFError:
                answers[rank.index] = None
    return answers


def _first_failure(ranks: Sequence[Rank], answers: dict[int, Answer | None]) -> RankFailure:
    """A silent death comes first, since its peers' errors are echoes; then the earliest exception."""
    dead = [index for index, answer in answers.items() if answer is None]
    if dead:
        return RankFailure(f"rank {dead[0]} of {len(ranks)} {ranks[dead[0]].describe_end()}", dead[0])
    failures = {index: answer for index, answer in answers.items() if answer is not None and answer.value is None}
    index, answer = min(failures.items(), key=lambda item: item[1].at)
    others = sorted(set(failures) - {index})
    echo = f"\n(ranks that failed after it: {others})" if others else ""
    exception = pickle.loads(answer.exception) if answer.exception else None
    failure = RankFailure(f"rank {index} of {len(ranks)} raised:\n{answer.traceback}{echo}", index, exception)
    failure.__cause__ = exception
    return failure


def _late(waiting: Sequence[Rank], timeout: float) -> RankFailure:
    stacks = "\n".join(f"rank {rank.index} stands at:\n{rank.stack()}" for rank in waiting)
    indices = [rank.index for rank in waiting]
    return RankFailure(f"ranks {indices} gave no answer within {timeout} s\n{stacks}", waiting[0].index)


def _end(ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        rank.process.kill()  # a rank that has answered has nothing left to do
    for rank in ranks:
        rank.process.join()
        rank.process.close()
        rank.pipe.close()


def _rank_main(
    index: int,
    world_size: int,
    port: int,
    stack_file: str,
    timeout: float,
    task: bytes,
    filters: list[tuple[Any, ...]],
    backend: str,
    sender: connection.Connection,
) -> None:
    """One rank's whole life."""
    with open(stack_file, "w") as stacks:
        faulthandler.enable(stacks)
        faulthandler.dump_traceback_later(timeout, file=stacks)
        try:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)  # whatever the machine's name resolves to
            torch.set_num_threads(1)
            _apply_filters(filters)
            # The parent's timeout comes first: it knows where every rank stands.
            patience = timedelta(seconds=timeout + 60)
            store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=patience)
            if backend != "gloo":
                torch.cuda.set_device(index)
            dist.init_process_group(backend, store=store, rank=index, world_size=world_size, timeout=patience)
            fn, args = pickle.loads(task)
            value = pickle.dumps(fn(index, world_size, *args))
            if dist.is_initialized():
                dist.barrier()  # a rank that left early would break its peers' last collective
            answer = Answer(value=value)
        except BaseException as exception:
            answer = Answer(traceback=traceback.format_exc(), exception=_pickled(exception))
        faulthandler.cancel_dump_traceback_later()
        sender.send(answer)
        sender.close()
        faulthandler.disable()


def _pickled(exception: BaseException) -> bytes | None:
    """None for an exception that does not survive the trip (a constructor with arguments of its own, say)."""
    with contextlib.suppress(Exception):
        pickled = pickle.dumps(exception)
        pickle.loads(pickled)
        return pickled
    return None


def _plain_filter(action: str, message: Any, category: type[Warning], module: Any, line: int) -> tuple[Any, ...]:
    return action, getattr(message, "pattern", message) or "", category, getattr(module, "pattern", module) or "", line


def _apply_filters(filters: list[tuple[Any, ...]]) -> None:
    warnings.resetwarnings()
    for action, message, category, module, line in reversed(filters):
        warnings.filterwarnings(action, message, category, module, line)
