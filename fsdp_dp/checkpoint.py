"""Checkpoints of a run: written in the background by all ranks, put in place by one rename, loaded on any other sharding.

A checkpoint is a folder of torch.distributed.checkpoint, with model and optimizer, and beside it `state.json`: the engine's
counts and the ledger's anchor. It is the state after the last release. Sums of a logical batch that is under way are no part
of it, nor are keys: whoever resumes draws new ones.

    checkpoints = Checkpoints(folder, model, optimizer, engine, ledger)     # on every rank; the ledger on rank 0
    state = checkpoints.load()                                              # None where there is none
    checkpoints.save(step)                                                  # returns when the copy is made
    checkpoints.wait()                                                      # at the end
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.optimizer import Optimizer

from fsdp_dp.averaging import WeightAverage
from fsdp_dp.engine import PrivacyEngine
from fsdp_dp.ledger import STATE_FILE, Anchor, Ledger, sync_folder
from fsdp_dp.standing import LedgerError

# Of checkpoints that are being written or removed; a name that `newest` never finds.
_UNFINISHED = ".unfinished-"
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
_TRAINABLE = StateDictOptions(ignore_frozen_params=True)
_SOME = StateDictOptions(strict=False)
_UNREADABLE = (
    "If it is damaged, remove it, and go on from the one before it: what was released since counts all the same"
)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; those that are in place are as they were."""


class Checkpoints:
    """The checkpoints below one folder, which all ranks see.

    Args:
        folder: holds one folder a checkpoint, `step-00000150`. Nobody else writes there (the ledger's lock).
        model, optimizer: as sharded.
        engine: the model's privacy engine; None for plain training.
        ledger: on rank 0 of a private run: every save reserves the next lease, before anything else.
        keep: how many checkpoints to keep; the older ones are removed after a newer one is in place.
        average: of the weights, saved and loaded with them.

    Every method is to be called on all ranks alike. A save that fails raises in the next call.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: Optimizer,
        engine: PrivacyEngine | None = None,
        ledger: Ledger | None = None,
        *,
        keep: int = 2,
        average: WeightAverage | None = None,
    ) -> None:
        self.folder, self.keep = folder, keep
        self._model, self._optimizer, self._engine, self._ledger = model, optimizer, engine, ledger
        self._average = average
        # Saving happens beside training, so it must not share a group: collectives of both would mix.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._is_main = self._group is None or dist.get_rank() == 0
        self._saving = _Background()
        self._at: int | None = None
        if self._is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(leftover)

    def save(self, step: int) -> None:
        """Begin to save the state after `step`; returns when it is copied to the CPU, and training may go on.

        A save under way is waited for. Between microbatches the copy is the state of the last release, without the sums
        that are pending. Not to be called between forward and backward.

        Raises:
            CheckpointError, OSError, LedgerError: the last save failed. The checkpoint before it is still there.
        """
        self.wait()
        if step == self._at:
            return
        self._at = step
        tensors: dict[str, Any] = {"model": get_model_state_dict(self._model)}
        # Asked for the state of an optimizer that has none, such as plain SGD, torch takes a step to make some.
        # Of a shard without trainable elements (LoRA, FSDP1) there is none either, and all ranks must do the same.
        if self._on_any_rank(bool(self._optimizer.state)):
            tensors["optimizer"] = get_optimizer_state_dict(self._model, self._optimizer, options=_OPTIONS)
        state = {"step": step, "privacy": None if self._engine is None else self._engine.state_dict()}
        if self._average is not None:
            tensors["average"] = self._averaged()
            state["averaged"] = self._average.updates
        writer = dcp.FileSystemWriter(str(self.folder / f"{_UNFINISHED}{_name(step)}"))
        if self._group is None:  # a script of one process; torch then warns, and filters are no thread's own
            self._write(writer, tensors, state)
        else:
            copy = writer.stage(tensors)
            self._saving.start(lambda: self._write(writer, copy, state))

    def wait(self) -> None:
        """Wait until the last save is in place; raises what it raised."""
        self._saving.result()

    def check(self) -> None:
        """Raise what a save that is over raised; does not wait."""
        if self._saving.done:
            self._saving.result()

    def load(self) -> dict[str, Any] | None:
        """Load the newest checkpoint into model, optimizer and engine; its `state.json`, or None where there is none.

        The engine draws fresh keys. With a ledger, releases count as the ledger says, which may be more than the
        checkpoint knows of.

        Raises:
            LedgerError: the ledger does not go through the checkpoint's anchor, or there is none where there was one.
            PrivacyError: the engine's mechanism is not the checkpoint's.
            CheckpointError: the newest checkpoint cannot be read, or is not one of this model and optimizer.
        """
        found = self._from_main(self._read_newest() if self._is_main else None)
        if isinstance(found, LedgerError | CheckpointError):
            raise found
        if found is None:
            self._load_engine(None)
            return None
        path, state = self.folder / found["name"], found["state"]
        reader = dcp.FileSystemReader(str(path))
        tensors: dict[str, Any] = {"model": get_model_state_dict(self._model)}
        if any(key.startswith("optimizer.") for key in _names_in(reader)):
            tensors["optimizer"] = get_optimizer_state_dict(self._model, self._optimizer, options=_OPTIONS)
        if self._average is not None and "averaged" in state:
            tensors["average"] = self._averaged()
        with _named(f"{path}: this checkpoint cannot be loaded into this model and optimizer. {_UNREADABLE}"):
            dcp.load(tensors, storage_reader=reader, process_group=self._group)
        set_model_state_dict(self._model, tensors["model"])
        if "optimizer" in tensors:
            set_optimizer_state_dict(self._model, self._optimizer, tensors["optimizer"], options=_OPTIONS)
        self._load_average(tensors.get("average"), state)
        self._load_engine(state["privacy"])
        self._at = state["step"]
        return dict(state)

    def _read_newest(self) -> dict[str, Any] | LedgerError | CheckpointError | None:
        """On rank 0: what it found, errors included, for the others wait to hear of it."""
        path = newest(self.folder)
        if path is None:
            return None
        try:
            state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
            self._check_anchor(state["ledger"])
        except LedgerError as error:
            return LedgerError(f"{path}: {error}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            return CheckpointError(
                f"{path}: {STATE_FILE} cannot be read ({type(error).__name__}: {error}). {_UNREADABLE}"
            )
        return {"name": path.name, "state": state}

    def _check_anchor(self, anchor: list[Any] | None) -> None:
        """A private run keeps its ledger: without it, what was released after the checkpoint would go uncounted."""
        if self._engine is None:
            return
        if (anchor is None) != (self._ledger is None):
            was, now = ("with", "none") if self._ledger is None else ("without", "one")
            raise LedgerError(
                f"this checkpoint was written {was} a ledger, and there is {now} now. Open the run's ledger on rank 0 and "
                "pass it, from the first step to the last; or load into a model without an engine"
            )
        if self._ledger is not None and anchor is not None:
            self._ledger.check(Anchor(*anchor))

    def _load_engine(self, saved: dict[str, Any] | None) -> None:
        """The engine's counts: the checkpoint's, and at least the ledger's."""
        standing = self._from_main(self._ledger.standing if self._ledger is not None else None)
        if self._engine is None:
            return
        counts = saved or self._engine.state_dict()
        if standing is not None:
            counts |= {
                "steps": max(counts["steps"], standing.session_start),
                "epochs": max(counts["epochs"], standing.earlier_epochs),
                "seeded": counts["seeded"] or standing.seeded,
            }
        if saved is not None or counts["steps"]:
            self._engine.load_state_dict(counts)

    def _averaged(self) -> dict[str, Any]:
        """Copies of the averaged weights, named and sharded as the model's state dict is."""
        assert self._average is not None
        with self._average.in_place():
            tensors: dict[str, Any] = get_model_state_dict(self._model, options=_TRAINABLE)
            return {name: x.clone() for name, x in tensors.items()}

    def _load_average(self, weights: dict[str, Any] | None, state: dict[str, Any]) -> None:
        """From a checkpoint that has none, the average begins with the weights that were loaded."""
        if self._average is None:
            return
        if weights is None:
            self._average.adopt(0)
            return
        with self._average.in_place():
            set_model_state_dict(self._model, weights, options=_SOME)
            self._average.adopt(state["averaged"])

    def _write(self, writer: dcp.FileSystemWriter, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """In the background: the next lease, the shards, then the rename that makes it a checkpoint."""
        if self._ledger is not None:
            self._ledger.reserve(state["privacy"]["steps"])
        final = self.folder / _name(state["step"])
        with _named(f"{final}: this checkpoint was not written; the one before it is still there"):
            dcp.save(tensors, storage_writer=writer, process_group=self._group)
        if self._is_main:
            anchor = None if self._ledger is None else self._ledger.anchor
            put_in_place(Path(writer.checkpoint_id), final, state | {"ledger": anchor})
            for old in finished(self.folder)[: -self.keep]:
                shutil.rmtree(old.rename(self.folder / f"{_UNFINISHED}{old.name}"))
        if self._group is not None:
            dist.barrier(self._group)

    def _on_any_rank(self, flag: bool) -> bool:
        if self._group is None:
            return flag
        total = torch.tensor(flag, dtype=torch.int32)
        dist.all_reduce(total, group=self._group)
        return bool(total)

    def _from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        if self._group is not None:
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


@contextmanager
def alone_without_warning() -> Iterator[None]:
    """torch warns that it saves or loads in one process; here that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _names_in(reader: dcp.FileSystemReader) -> list[str]:
    """What a checkpoint holds. Raises CheckpointError if that cannot be read: torch's reader lets any error through."""
    try:
        return list(reader.read_metadata().state_dict_metadata)
    except Exception as error:
        raise CheckpointError(
            f"{reader.checkpoint_id}: .metadata cannot be read ({type(error).__name__}: {error}). {_UNREADABLE}"
        ) from error


@contextmanager
def _named(what: str) -> Iterator[None]:
    """torch's errors here are no `Exception` and hold a traceback for each rank; this names the cause in one line."""
    try:
        with alone_without_warning() if not dist.is_initialized() else nullcontext():
            yield
    except CheckpointException as error:
        causes = "; ".join(f"rank {rank}: {cause!r}" for rank, (cause, _) in error.failures.items())
        raise CheckpointError(f"{what} ({causes})") from error


def put_in_place(writing: Path, final: Path, state: dict[str, Any]) -> None:
    """Make a checkpoint of what was written: complete under its name, or not there at all, whenever a process dies."""
    with (writing / STATE_FILE).open("w", encoding="utf-8") as file:
        json.dump(state, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(writing)
    writing.rename(final)
    sync_folder(final.parent)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def finished(folder: Path) -> list[Path]:
    """The checkpoints below a folder, oldest first."""
    return sorted(folder.glob("step-*"))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint below a folder."""
    return finished(folder)[-1] if finished(folder) else None


class _Background:
    """One task at a time in a thread. The thread is a daemon: a task that hangs does not keep a failed process alive."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        atexit.register(_say_unfinished, weakref.ref(self))

    @property
    def done(self) -> bool:
        return self._thread is not None and not self._thread.is_alive()

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, task: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=self._run, args=(task,), name="checkpoint", daemon=True)
        self._thread.start()

    def result(self) -> None:
        """Wait for the task; raise what it raised, once."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as failure:
            self._failure = failure


def _say_unfinished(background: weakref.ref[_Background]) -> None:
    """The thread ends with the process, somewhere inside a collective, and that says nothing of a checkpoint."""
    found = background()
    if found is not None and found.running:
        print(
            "fsdp_dp: the process ends while a checkpoint is being saved; that one is lost, the one before it is not. Call "
            "checkpoints.wait() before the end of the program",
            file=sys.stderr,
            flush=True,
        )
