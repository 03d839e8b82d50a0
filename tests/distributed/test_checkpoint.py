"""A run that changes its sharding at every checkpoint ends where one that never stopped does: the oracle's loop."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fsdp_dp import PrivacyEngine, PrivacyError
from fsdp_dp.checkpoint import CheckpointError, Checkpoints, finished, newest
from fsdp_dp.export import main as export
from fsdp_dp.export import model_weights
from fsdp_dp.ledger import LEDGER_FILE, STATE_FILE, Ledger
from fsdp_dp.standing import LedgerError
from fsdp_dp.training.zero1 import Zero1
from tests.distributed.backends import (
    BACKENDS,
    EXPECTED_BATCH_SIZE,
    TOLERANCE,
    privacy_config,
    quiet_torch,
    whole_parameters,
)
from tests.distributed.harness import run
from tests.oracle import CASES, OPTIMIZERS, Gradients, median_norm, relative_error, rows_of_step, share, trained

# One step on each, in this order, on so many ranks; then one more in the test process, without a process group.
SPLIT = ((2, ("fsdp1", "fsdp2", "tp 1x2", "fsdp1 shard_grad_op", "fsdp2 root only", "fsdp1 of torch")),)
REPLICATED = (
    (4, ("ddp", "fsdp1 hybrid", "zero1", "fsdp2 hybrid", "fsdp1 no_shard", "tp 2x2", "fsdp1 hybrid zero2")),
    (2, ("zero1", "fsdp1 hybrid", "ddp")),
)
CHAINS = {"split": SPLIT, "replicated": REPLICATED}
LAST_STEP = {name: sum(len(backends) for _, backends in chain) for name, chain in CHAINS.items()}
ROUTES = (
    ("split", "decoder", "adamw"),
    ("split", "tied", "momentum"),
    ("split", "partly frozen", "sgd"),
    ("replicated", "tied", "adamw"),
)
Route = tuple[str, str, str]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What torch says of FSDP1 without a device mesh, whose state is made of its older ShardedTensor."""
    with quiet_torch():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed")
        warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
        warnings.filterwarnings("ignore", "When using ``NO_SHARD``", UserWarning)
        yield


class Run:
    """A model with what trains and saves it, fresh; its weights are not the oracle's until they are loaded."""

    def __init__(self, folder: Path, name: str, optimizer: str, backend: str, ledger: Ledger | None = None) -> None:
        self.case = CASES[name]
        model = self.case.model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        privacy = privacy_config(max_grad_norm=median_norm(name), steps=10)
        self.model, self.engine = BACKENDS[backend](model, privacy)
        self.optimizer = (
            self._zero1(optimizer) if backend == "zero1" else OPTIMIZERS[optimizer](self.model.parameters())
        )
        self.checkpoints = Checkpoints(folder, self.model, self.optimizer, self.engine, ledger)

    def _zero1(self, name: str) -> torch.optim.Optimizer:
        plain = OPTIMIZERS[name]
        assert isinstance(plain, functools.partial)
        return Zero1(self.model.parameters(), optimizer_class=plain.func, **plain.keywords)

    def step(self, number: int) -> None:
        """The oracle's logical batch of this number."""
        for numbers, mask in self.microbatches(number):
            self.backward(numbers, mask)
        self.optimizer.step()

    def microbatches(self, number: int) -> list[Any]:
        ranks = {"rank": self.engine.model.data_rank, "size": self.engine.model.data_size}
        return share(rows_of_step(self.case.rows, number), **ranks, microbatch=2)

    def backward(self, numbers: torch.Tensor, mask: torch.Tensor) -> None:
        inputs, targets = self.case.batch()
        with self.engine.microbatch(mask):
            self.case.row_losses(self.model(inputs[numbers]), targets[numbers]).mean().backward()


def start(folder: Path, name: str, optimizer: str) -> Gradients:
    """Step 0, without a process group, and its checkpoint; the initial parameters."""
    first = Run(folder, name, optimizer, "plain")
    first.model.load_state_dict(CASES[name].model().state_dict())
    initial = whole_parameters(first.model)
    first.step(0)
    first.checkpoints.save(1)
    first.checkpoints.wait()
    first.engine.detach()
    return initial


def follow(rank: int, world_size: int, folders: dict[Route, Path], first: int, backends: tuple[str, ...]) -> None:
    """One step on each sharding, from step `first` on; each begins with the checkpoint of the one before it."""
    for (_, name, optimizer), folder in folders.items():
        for step, backend in enumerate(backends, start=first):
            with quiet():
                one = Run(folder, name, optimizer, backend)
                state = one.checkpoints.load()
                assert state is not None and state["step"] == step == one.engine.steps
                one.step(step)
                one.checkpoints.save(step + 1)
                one.step(step + 2)  # training goes on while the checkpoint is written, and is no part of it
                one.checkpoints.wait()
                one.engine.detach()


def check_troubles(rank: int, world_size: int, folder: Path) -> None:
    check_save_within_a_logical_batch(folder / "within")
    check_failure_of_one_rank(rank, folder / "failing")
    check_damage(rank, folder / "failing")


def check_save_within_a_logical_batch(folder: Path) -> None:
    """What is pending is no part of a checkpoint: loading it leaves the state of the last release."""
    with quiet():
        one = Run(folder, "decoder", "adamw", "fsdp2")
        one.step(0)
        before = whole_parameters(one.model)
        one.backward(*one.microbatches(1)[0])
        one.checkpoints.save(1)
        one.checkpoints.wait()
        weights = model_weights(folder / "step-00000001")
        assert all(torch.equal(weights[name], value) for name, value in before.items())
        one.checkpoints.load()
        with pytest.raises(PrivacyError, match="without a backward since the last release"):
            one.optimizer.step()
        one.engine.detach()


def check_failure_of_one_rank(rank: int, folder: Path) -> None:
    """A rank that cannot write is named on all, and no checkpoint comes to be."""
    with quiet():
        one = Run(folder, "decoder", "sgd", "fsdp2")
        one.step(0)
        one.checkpoints.save(1)
        one.checkpoints.wait()
        one.checkpoints.save(2)
        one.checkpoints.wait()
        if rank == 1:
            torch.distributed.checkpoint.FileSystemWriter.write_data = _disk_is_full  # type: ignore[method-assign]
        one.checkpoints.save(3)
        with pytest.raises(CheckpointError, match=r"step-00000003.*\(rank 1: OSError.*No space left"):
            one.checkpoints.wait()
        assert newest(folder) == folder / "step-00000002"
        one.engine.detach()


def check_damage(rank: int, folder: Path) -> None:
    """A checkpoint that cannot be read is named on all ranks; without it, the one before it is loaded."""
    with quiet():
        one = Run(folder, "decoder", "sgd", "fsdp2")
        path = newest(folder)
        assert path is not None
        damages = ((STATE_FILE, "state.json cannot be read"), (".metadata", "metadata cannot be read"),
                   ("__1_0.distcp", "cannot be loaded"))  # fmt: skip
        for name, message in damages:
            whole = (path / name).read_bytes()
            torch.distributed.barrier()
            if rank == 0:
                (path / name).write_bytes(whole[: len(whole) // 2])
            torch.distributed.barrier()
            with pytest.raises(
                CheckpointError, match=f"step-00000002.*{message}.*remove it, and go on from the one before"
            ):
                one.checkpoints.load()
            torch.distributed.barrier()
            if rank == 0:
                (path / name).write_bytes(whole)
        if rank == 0:
            shutil.rmtree(path)
        torch.distributed.barrier()
        state = one.checkpoints.load()
        assert state is not None and state["step"] == 1
        one.engine.detach()


def _disk_is_full(*arguments: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Route, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {route: root / "-".join(route) for route in ROUTES}


@pytest.fixture(scope="module")
def initial(folders: dict[Route, Path]) -> dict[Route, Gradients]:
    """The parameters before step 0; the ranks have followed the chains."""
    initial = {route: start(folder, *route[1:]) for route, folder in folders.items()}
    for name, chain in CHAINS.items():
        along, first = {route: folder for route, folder in folders.items() if route[0] == name}, 1
        for ranks, backends in chain:
            run(follow, ranks, along, first, backends, timeout=300.0)
            first += len(backends)
    return initial


def test_troubles_are_named_on_all_ranks(tmp_path: Path) -> None:
    run(check_troubles, 2, tmp_path)


@pytest.mark.parametrize("route", ROUTES)
def test_shardings_take_turns(route: Route, folders: Any, initial: Any, tmp_path: Path) -> None:
    """Seen to fail when checkpoints leave the optimizer out, and when they are written without a copy of the state."""
    chain, name, optimizer = route
    steps = LAST_STEP[chain] + 1
    weights = model_weights(folders[route] / f"step-{steps:08d}")
    moved = {n: weights[n] - before for n, before in initial[route].items()}
    assert relative_error(moved, expected(name, optimizer, steps)) < TOLERANCE
    last = Run(folders[route], name, optimizer, "plain")
    last.checkpoints.load()
    last.step(steps)
    moved = {n: p - initial[route][n] for n, p in whole_parameters(last.model).items()}
    assert relative_error(moved, expected(name, optimizer, steps + 1)) < TOLERANCE
    last.engine.detach()


def expected(name: str, optimizer: str, steps: int) -> Gradients:
    return trained(name, steps=steps, optimizer=optimizer, expected_batch_size=EXPECTED_BATCH_SIZE)


def test_what_a_checkpoint_holds(folders: Any, initial: Any) -> None:
    """Model, optimizer and counts: no sums of rows, no keys. The two newest are kept, and nothing half done."""
    folder = folders["split", "decoder", "adamw"]
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-00000006", "step-00000007"]
    state = json.loads((folder / names[-1] / "state.json").read_text())
    assert state["step"] == state["privacy"]["steps"] == 7
    assert not any("key" in name or name == "seed" for name in state["privacy"])
    stored = torch.distributed.checkpoint.FileSystemReader(str(folder / names[-1])).read_metadata().state_dict_metadata
    parts = {".".join(name.split(".")[:2]) for name in stored if not name.startswith("model.")}
    assert parts == {"optimizer.state", "optimizer.param_groups"}
    shapes = {name: value.shape for name, value in CASES["decoder"].model().state_dict().items()}
    assert {
        name.removeprefix("model."): entry.size for name, entry in stored.items() if name.startswith("model.")
    } == shapes


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_export_for_use_without_this_library(ending: str, folders: Any, initial: Any, tmp_path: Path) -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "checkpoints").symlink_to(folders["split", "tied", "momentum"])
    out = tmp_path / f"model.{ending}"
    assert export([str(run_folder), str(out)]) == 0
    weights = load_file(out) if ending == "safetensors" else torch.load(out, weights_only=True)
    model: nn.Module = CASES["tied"].model()
    model.load_state_dict(weights)
    assert torch.equal(model.token.weight, model.head.weight)
    assert export([str(tmp_path), str(out)]) == 1


# One process


def test_a_damaged_checkpoint_is_not_exported_over_what_is_there(
    folders: Any, initial: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen to fail when DCP's CheckpointException, which is no Exception, was not caught."""
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "weights.pt"
    shutil.copytree(finished(folders["split", "tied", "momentum"])[0], checkpoint)
    assert export([str(checkpoint), str(out)]) == 0
    before = out.read_bytes()
    for part in checkpoint.glob("*.distcp"):
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    assert export([str(checkpoint), str(out)]) == 1
    assert "could not read" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_an_exit_during_a_save_says_so() -> None:
    """Seen to fail when nothing was said at exit: the process then aborts without a cause."""
    program = (
        "import time; from fsdp_dp.checkpoint import _Background; b = _Background(); b.start(lambda: time.sleep(60)); "
        "raise SystemExit(0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert "checkpoints.wait()" in done.stderr


def plain_run(folder: Path, ledger: Ledger | None = None) -> Run:
    return Run(folder / "checkpoints", "decoder", "sgd", "plain", ledger)


def begin(folder: Path, engine_privacy: Any, lease: int = 4) -> Ledger:
    ledger = Ledger(folder / LEDGER_FILE)
    ledger.begin(engine_privacy, 0.0, lease=lease)
    return ledger


def test_a_load_counts_what_the_ledger_counts(tmp_path: Path) -> None:
    """Seen to fail when the engine's count comes from the checkpoint alone."""
    privacy = privacy_config(max_grad_norm=median_norm("decoder"), steps=10)
    ledger = begin(tmp_path, privacy)
    ledger.reserve(0)
    first = plain_run(tmp_path, ledger)
    assert first.checkpoints.load() is None and first.engine.steps == 0
    first.step(0)
    first.checkpoints.save(1)
    first.checkpoints.wait()
    assert ledger.covers(5) and not ledger.covers(6)
    keys = engine_keys(first.engine)
    first.engine.detach()
    # The process dies here.
    second = plain_run(tmp_path, begin(tmp_path, privacy))
    state = second.checkpoints.load()
    assert state is not None and state["step"] == 1
    assert second.engine.steps == 5
    assert not keys & engine_keys(second.engine)
    second.engine.detach()


def engine_keys(engine: PrivacyEngine) -> set[bytes]:
    return {engine._keys._master, engine._keys.noise}


def test_a_crash_before_the_first_checkpoint_is_counted(tmp_path: Path) -> None:
    privacy = privacy_config(max_grad_norm=median_norm("decoder"), steps=10)
    begin(tmp_path, privacy).reserve(0)
    again = plain_run(tmp_path, begin(tmp_path, privacy))
    assert again.checkpoints.load() is None
    assert again.engine.steps == 4
    again.engine.detach()


def test_a_checkpoint_of_another_ledger_is_refused(tmp_path: Path) -> None:
    privacy = privacy_config(max_grad_norm=median_norm("decoder"), steps=10)
    ledger = begin(tmp_path, privacy)
    first = plain_run(tmp_path, ledger)
    first.step(0)
    with pytest.raises(LedgerError, match="a lease from 1 until 5, where 0 were counted"):
        first.checkpoints.save(1)  # a release that nobody reserved
    first.engine.detach()
    ledger = begin(tmp_path, privacy)
    ledger.reserve(0)
    first = plain_run(tmp_path, ledger)
    first.step(0)
    first.checkpoints.save(1)
    first.checkpoints.wait()
    first.engine.detach()
    (tmp_path / LEDGER_FILE).unlink()
    second = plain_run(tmp_path, begin(tmp_path, privacy))
    with pytest.raises(LedgerError, match=r"step-00000001: the checkpoint was written when the ledger had 4 records"):
        second.checkpoints.load()
    second.engine.detach()


@pytest.mark.parametrize("at_first", [True, False])
def test_a_ledger_is_kept_for_a_whole_run(at_first: bool, tmp_path: Path) -> None:
    """Seen to fail, both ways, without the check: releases after the checkpoint would then be counted by nobody."""
    privacy = privacy_config(max_grad_norm=median_norm("decoder"), steps=10)
    ledger = begin(tmp_path, privacy)
    ledger.reserve(0)
    first = plain_run(tmp_path, ledger if at_first else None)
    first.step(0)
    first.checkpoints.save(1)
    first.engine.detach()
    second = plain_run(tmp_path, None if at_first else ledger)
    with pytest.raises(
        LedgerError, match=r"written with a ledger, and there is none" if at_first else "written without"
    ):
        second.checkpoints.load()
    second.engine.detach()


@pytest.mark.parametrize("instant", ["write_data", "finish", "state", "rename", "after"])
def test_a_save_that_dies_leaves_the_checkpoint_before_it(instant: str, tmp_path: Path, monkeypatch: Any) -> None:
    """The process dies while it writes shards, metadata or state, before the rename, and after it."""
    first = plain_run(tmp_path)
    first.step(0)
    first.checkpoints.save(1)
    first.checkpoints.wait()
    saved = whole_parameters(first.model)
    first.step(1)

    class Killed(RuntimeError):
        pass

    def die(*arguments: Any, **keywords: Any) -> None:
        raise Killed

    target = {
        "write_data": "torch.distributed.checkpoint.FileSystemWriter.write_data",
        "finish": "torch.distributed.checkpoint.FileSystemWriter.finish",
        "state": "json.dump",
        "rename": "pathlib.Path.rename",
        "after": "fsdp_dp.checkpoint.finished",
    }[instant]
    with monkeypatch.context() as patch:
        patch.setattr(target, die)
        with pytest.raises((Killed, CheckpointError)):
            first.checkpoints.save(2)
    first.engine.detach()
    second = plain_run(tmp_path)
    state = second.checkpoints.load()
    assert state is not None and state["step"] == (2 if instant == "after" else 1)
    if instant != "after":
        loaded = whole_parameters(second.model)
        assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    second.engine.detach()
    assert all(path.name.startswith("step-") for path in finished(tmp_path / "checkpoints"))
    assert not list((tmp_path / "checkpoints").glob(".*"))
