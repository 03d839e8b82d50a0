"""Whatever ends a run: all ranks end with the cause named, the run goes on, and no release is lost, uncounted or repeated.

Each scenario is one run, hit by one fault after another; every start is a resume, mostly on another sharding than the last,
and the last one is left alone until its budget is spent. What is checked after each is in `Scenario.check`.
"""

import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fsdp_dp.ledger import LEDGER_FILE, Ledger, check_run, read
from fsdp_dp.ledger import main as ledger_command
from fsdp_dp.training.app import EXIT_REQUEUE
from fsdp_dp.training.run_folder import METRICS_FILE
from tests.integration.faults import ANYWHERE, GRACE_S, Launcher

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [
    "device=cpu",
    "batch_size=12",
    "microbatch_size=4",
    "checkpoint_every=4",
    "evaluate_every=1000",
    "model.layers=1",
    "model.width=16",
    "model.mlp_width=24",
    "model.heads=2",
    "model.block_size=24",
    "privacy.noise_multiplier=1",
    "privacy.target_epsilon=null",
    "privacy.accountant=pld",
    "data=text_files",
    "resume=true",
]
SHARDINGS = ("full_shard", "fully_shard", "shard_grad_op")


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("noise", "engine", "ledger"):
        (folder / f"{name}.txt").write_bytes((ROOT / "fsdp_dp" / f"{name}.py").read_bytes())
    return folder


class Scenario:
    """One run, started again and again."""

    steps = 80
    options: tuple[str, ...] = ()

    def __init__(self, folder: Path, corpus: Path, launcher: Launcher) -> None:
        self.folder, self.corpus, self.launcher = folder, corpus, launcher
        self.run = folder / "run"
        self.sessions = 0
        self.releases: dict[int, int] = {}  # release -> the session that drew its noise
        self.values: list[np.ndarray] = []

    def start(
        self, *faults: dict[str, Any], options: Sequence[str] = (), torchrun: bool = False
    ) -> tuple[list[int], str]:
        """One start with faults, and what it left behind checked: exit codes, and what the ranks said."""
        codes, said = self.launch(*faults, options=options, torchrun=torchrun)
        self.check(said)
        self.sessions += 1
        return codes, said

    def launch(
        self, *faults: dict[str, Any], options: Sequence[str] = (), torchrun: bool = False
    ) -> tuple[list[int], str]:
        environment = {
            "FAULTS": json.dumps(faults),
            "FAULT_FOLDER": str(self.folder),
            "FAULT_SESSION": str(self.sessions),
        }
        sharding = f"sharding={SHARDINGS[self.sessions % len(SHARDINGS)]}"
        overrides = [
            *OPTIONS,
            f"steps={self.steps}",
            f"data.path={self.corpus}/*.txt",
            f"output_dir={self.run}",
            sharding,
            *self.options,
            *options,
        ]
        start = self.launcher.torchrun if torchrun else self.launcher.start
        ended = start(overrides, environment, str(self.folder / "output-{rank}"))
        said = "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("output-*")))
        assert ended.get("seconds_after_failure", 0.0) < 20, said
        for path in self.folder.glob("output-*"):
            path.unlink()
        return ended["codes"], said

    def copy(self, name: str, run: Path) -> "Scenario":
        """Another run that goes on from a copy of this one's folder."""
        copy = Scenario(self.folder / name, self.corpus, self.launcher)
        shutil.copytree(run, copy.run)
        copy.steps, copy.sessions = self.steps, self.sessions
        copy.releases, copy.values = dict(self.releases), list(self.values)
        return copy

    def check(self, said: str) -> None:
        """Every release drawn is counted, and made in one start alone.

        Seen to fail when a start counts from its checkpoint alone, and when releases are made that no lease covers.
        """
        if not (self.run / LEDGER_FILE).exists() or not read(self.run / LEDGER_FILE).records:
            assert not any(path.stat().st_size for path in self.folder.glob("draws-*")), said
            return
        counted = check_run(self.run).standing().counted
        for path in self.folder.glob(f"draws-{self.sessions}-*"):
            for release, values in draws(path):
                assert self.releases.setdefault(release, self.sessions) == self.sessions, said
                assert release <= counted, said
                self.values.append(values)
            path.unlink()

    def finish(self, *faults: dict[str, Any], torchrun: bool = False) -> None:
        """Left alone, or with a fault that ends nothing, the run ends at its budget, and no noise value came twice.

        Seen to fail with one key and one release number for all noise.
        """
        codes, said = self.start(*faults, torchrun=torchrun)
        assert not any(codes), said
        standing = check_run(self.run).standing()
        assert standing.counted == self.steps and not standing.running
        assert max(self.releases) <= self.steps
        uncounted = self.steps - len(self.releases)
        assert 0 <= uncounted <= standing.lost, (uncounted, standing)
        values = np.concatenate(self.values)
        assert np.unique(values).size == values.size, "a noise value came twice"
        assert ledger_command(["verify", str(self.run)]) == 0
        report = (self.run / "report.md").read_text()
        assert f"{self.steps} of {self.steps}" in report and f"{standing.epsilon().upper:.6g} (upper bound" in report


def draws(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """(release, values) of each recorded draw."""
    data = path.read_bytes()
    at = 0
    while at + 16 <= len(data):
        release, count = (int.from_bytes(data[at + i : at + i + 8], "little") for i in (0, 8))
        yield release, np.frombuffer(data[at + 16 : at + 16 + 8 * count])
        at += 16 + 8 * count


@pytest.fixture
def scenario(tmp_path: Path, corpus: Path, launcher: Launcher) -> Scenario:
    return Scenario(tmp_path, corpus, launcher)


# (point, passage, ranks, action): within the first moments, a release, the ledger's write and every part of a checkpoint.
KILLS = [
    ("ledger", 1, [0], "kill all"),  # the first line of all
    ("config", 1, [0], "kill"),
    ("release", 3, [1], "kill"),
    ("draw", 30, [0], "kill all"),
    ("ledger", 2, [0], "kill all"),  # the first lease of a start
    ("ledger", 3, [0], "kill"),  # one that comes with a checkpoint
    ("shards", 2, [1], "kill"),
    ("metadata", 1, [0], "kill all"),
    ("rename", 2, [0], "kill all"),
    ("renamed", 1, [0], "kill"),
]


def test_kills_at_ten_points(scenario: Scenario) -> None:
    for point, count, ranks, action in KILLS:
        codes, said = scenario.start({"point": point, "count": count, "ranks": ranks, "action": action})
        assert -9 in codes and 0 not in codes, (point, codes, said)
        if action == "kill":
            assert f"fsdp_dp.train: rank {1 - ranks[0]} ended: lost another rank" in said, (point, said)
    scenario.finish()
    assert check_run(scenario.run).standing().sessions == len(KILLS)  # the first left no line


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(9))
def test_kills_at_random_points(seed: int, scenario: Scenario) -> None:
    """Six random passages of any point, in one rank or in both, for each seed: 54 in all."""
    random.seed(seed)
    for _ in range(6):
        fault = {
            "point": ANYWHERE,
            "count": random.randrange(1, 130),
            "ranks": [random.randrange(2)],
            "action": random.choice(["kill", "kill all"]),
        }
        codes, said = scenario.start(fault)
        assert -9 in codes and 0 not in codes, (fault, codes, said)
    scenario.finish()


FAILURES = [
    ({"point": "losses", "count": 5, "ranks": [1], "action": "out of memory"}, "Lower microbatch_size"),
    ({"point": "data", "count": 6, "ranks": [0], "action": "unreadable"}, "Input/output error"),
    ({"point": "data", "count": 6, "ranks": [0], "action": "unreadable", "workers": 1}, "Caught OSError in DataLoader"),
    ({"point": "data", "count": 4, "ranks": [1], "action": "kill", "workers": 1}, "DataLoader worker (pid"),
    ({"point": "shards", "count": 1, "ranks": [1], "action": "full disk"}, "File too large"),
    ({"point": "ledger", "count": 3, "ranks": [0], "action": "full disk"}, "File too large"),
]


def test_failures_are_named_by_all_ranks(scenario: Scenario) -> None:
    """Out of memory, rows that cannot be read, workers that die, a disk without room; then a row without a finite gradient.

    Seen to fail when a rank does not tell the others why it ends.
    """
    scenario.steps = 50
    for fault, cause in FAILURES:
        codes, said = scenario.start(fault)
        assert codes == [1, 1], (fault, codes, said)
        assert sum(cause in line for line in said.splitlines() if "fsdp_dp.train: rank" in line) == 2, (fault, said)
    # In a step's first microbatch, whose first row is no padding.
    scenario.finish({"point": "step", "count": 3, "ranks": [1], "action": "nan"})
    assert "(here: 1 non-finite rows, which contributed nothing)" in (scenario.run / "report.md").read_text()


def test_signals_save_and_lose_nothing(scenario: Scenario) -> None:
    """A slow rank only takes time; SIGTERM ends a run with 0, SIGUSR1 on one rank with the code to start it again.

    Draws are cut here, so that every step has the same shape; what that costs is said at every start.
    """
    scenario.steps, scenario.options = 16, ("privacy.max_batch_size=20",)
    slow = {"point": "step", "count": 2, "ranks": [1], "action": "slow"}
    for action, code in (("terminate all", 0), ("usr1", EXIT_REQUEUE)):
        codes, said = scenario.start(slow, {"point": "step", "count": 6, "ranks": [0], "action": action})
        assert codes == [code, code], said
        assert "every step has the same shape: at most 20 rows; a draw is cut with probability 0.0" in said
        if action == "terminate all":
            told = float((scenario.folder / "terminated").read_text())
            assert time.monotonic() - told < GRACE_S, "torchrun and Slurm kill after 30 s"
        standing = check_run(scenario.run).standing()
        assert (standing.lost, standing.running) == (0, False)
        assert standing.counted == len(scenario.releases)
    assert len(scenario.releases) == 12
    scenario.finish()
    assert len(scenario.releases) == scenario.steps


@pytest.mark.slow
def test_under_torchrun(scenario: Scenario) -> None:
    """The same with torchrun as the launcher, which names the rank that a signal killed."""
    scenario.steps = 30
    for fault, cause in (
        ({"point": "release", "count": 3, "ranks": [1], "action": "kill"}, "SIGKILL"),
        FAILURES[0],
    ):
        codes, said = scenario.start(fault, torchrun=True)
        assert codes != [0] and cause in said, said
    scenario.finish(torchrun=True)


def test_one_writer_and_one_model(scenario: Scenario) -> None:
    """A second job on the folder is refused, and so is another model or a folder that is taken."""
    scenario.start({"point": "step", "count": 6, "ranks": [0], "action": "terminate all"})
    for options, message in (
        (["resume=false"], "already holds a run: go on with it by resume=true"),
        (["model.width=32"], "model.width was 16 when the run in"),
        (["privacy.noise_multiplier=2"], "noise_multiplier was 1.0 when this run began and is 2.0 now"),
        (["privacy.max_grad_norm=1.0"], "max_grad_norm was 0.5 when this run began and is 1.0 now"),
        (["steps=40"], "steps=40 is less than the 80 releases"),
    ):
        codes, said = scenario.start(options=options)
        assert 0 not in codes and message in said, said
    holder = Ledger(scenario.run / LEDGER_FILE)
    codes, said = scenario.start()
    assert codes == [1, 1] and "another process works on" in said, said
    assert holder.standing is not None


def test_a_budget_that_a_crash_used_up(scenario: Scenario) -> None:
    """The lease of a run this short is all of its budget: nothing is left to release, and the report says so."""
    scenario.steps = 5
    scenario.start({"point": "release", "count": 2, "ranks": [1], "action": "kill"})
    scenario.finish()
    assert len(scenario.releases) <= 2
    report = (scenario.run / "report.md").read_text()
    assert "5 of 5, 5 of which were lost when the run was interrupted, and count all the same" in report


def edited(run: Path) -> None:
    ledger = run / LEDGER_FILE
    ledger.write_text(ledger.read_text().replace('"until": 5', '"until": 4'))


def cut_with_metrics(run: Path) -> None:
    ledger = run / LEDGER_FILE
    ledger.write_text(ledger.read_text().splitlines(keepends=True)[0])
    shutil.rmtree(run / "checkpoints")


def cut_with_checkpoints(run: Path) -> None:
    ledger = run / LEDGER_FILE
    ledger.write_text(ledger.read_text().splitlines(keepends=True)[0])
    (run / METRICS_FILE).unlink()


def without_its_ledger(run: Path) -> None:
    (run / LEDGER_FILE).unlink()


TOUCHED = [
    (edited, "line 2 does not continue the chain"),
    (cut_with_checkpoints, "does not go through it: it was cut"),
    (cut_with_metrics, "counts 0 releases, and metrics.jsonl beside it tells of step 6"),
    (without_its_ledger, "a private run without its ledger.jsonl"),
]


def test_a_folder_that_was_touched_is_refused_or_right(scenario: Scenario) -> None:
    """Damage to the ledger is refused; a checkpoint may go; a longer run is one run; noise is no copy's own twin.

    Two copies of a folder that both go on are not noticed, as the ledger says; but none of their noise is the same. Seen to
    fail when all processes draw the same keys.
    """
    scenario.steps = 12
    scenario.start({"point": "step", "count": 6, "ranks": [0], "action": "terminate all"})
    whole = scenario.folder / "whole"
    scenario.run.rename(whole)
    for touch, message in TOUCHED:
        shutil.copytree(whole, scenario.run)
        touch(scenario.run)
        codes, said = scenario.launch()
        assert 0 not in codes and message in said, (touch, said)
        assert not any(path.stat().st_size for path in scenario.folder.glob("draws-*")), (touch, said)
        shutil.rmtree(scenario.run)
    copies = [scenario.copy(name, whole) for name in ("first", "second")]
    shutil.rmtree(copies[0].run / "checkpoints" / "step-00000006")
    for copy in copies:
        copy.finish()
        assert len(copy.releases) == 12
    values = np.concatenate([value for copy in copies for value in copy.values[len(scenario.values) :]])
    assert np.unique(values).size == values.size
    copies[0].steps = 14
    copies[0].finish()
    assert check_run(copies[0].run).standing().extended
