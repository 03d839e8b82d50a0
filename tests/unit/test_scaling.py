"""The scaling command: what it wants, checks, goes on from, and says in the end; plans of 512 ranks."""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from fsdp_dp.benchmark import cases, meshes
from scripts.scaling import checks, measuring, predictions, running, summary, wanted


def launches(**changes: Any) -> list[wanted.Launch]:
    asked: dict[str, Any] = {"sizes": (1, 2, 4, 8), "kinds": wanted.SHARDINGS, "models": ["llama-tiny"]}
    return wanted.launches(**{**asked, "sides": ["flat"], "weak": 4, "strong": 8, **changes})


def row(**changes: Any) -> dict[str, Any]:
    found = {
        "case": "llama-tiny@3x16 4 microbatch(es)",
        "side": "flat",
        "sharding": "full_shard",
        "gpus": 2,
        "device": "2 x GPU",
        "torch": "2.11",
        "commit": "abc",
        "rows": 3,
        "ms": 100.0,
        "peak_GiB": 10.0,
        "replicas": "none",
        "collectives": {"all-gather": 10},
        "collectives_bytes": {"all-gather": 1000},
    }
    return found | changes


def test_what_is_wanted() -> None:
    found = {(launch.gpus, launch.sharding): launch.microbatches for launch in launches()}
    assert list(found) == [
        *((1, "full_shard"), (2, "full_shard"), (2, "tp=2")),
        *((4, "full_shard"), (4, "hsdp=2x2"), (4, "tp=2"), (8, "full_shard"), (8, "hsdp=2x4"), (8, "tp=2")),
    ]
    assert {launch["weak"] for launch in found.values()} == {4}
    strong = {where: launch["strong"] for where, launch in found.items()}
    assert [strong[n, "full_shard"] for n in (1, 2, 4, 8)] == [8, 4, 2, 1]
    assert (strong[2, "tp=2"], strong[8, "tp=2"], strong[8, "hsdp=2x4"]) == (8, 2, 1)
    (both,) = launches(sizes=[2], kinds=["full_shard"])
    assert [case.side for case in both.cases()] == ["plain-fsdp2", "flat"], "weak and strong are one measurement here"


def test_checks_find_what_does_not_hold() -> None:
    plain, private = row(side="plain-fsdp2"), row()
    assert checks.faults(private, plain) == []
    assert checks.faults(row(replicas="differ"), plain) == ["replicas differ"]
    (more,) = checks.faults(row(collectives={"all-gather": 11}), plain)
    assert more == "all-gather: +1 calls and +0 bytes beside plain"
    (other,) = checks.faults(row(collectives_bytes={"all-gather": 1001}), plain)
    assert other == "all-gather: +0 calls and +1 bytes beside plain"
    assert "all-reduce: +1 calls" in checks.faults(row(collectives={"all-gather": 10, "all-reduce": 1}), plain)[0]


def test_tensor_parallelism_may_add_norms_and_nothing_else() -> None:
    plain = row(side="plain-fsdp2", sharding="tp=2", collectives={"all-reduce": 4}, collectives_bytes={"all-reduce": 9})
    norms = 5 * 3 * 8  # float64 [5, B]
    sent = {"collectives": {"all-reduce": 6}, "collectives_bytes": {"all-reduce": 9 + 2 * norms}}
    assert checks.faults(row(sharding="tp=2", **sent), plain) == []
    sent["collectives_bytes"] = {"all-reduce": 9 + 7 * norms}  # of several groups together
    assert checks.faults(row(sharding="tp=2", **sent), plain) == []
    sent["collectives_bytes"] = {"all-reduce": 9 + norms}
    assert checks.faults(row(sharding="tp=2", **sent), plain) == ["all-reduce: +2 calls and +120 bytes beside plain"]
    sent["collectives_bytes"] = {"all-reduce": 10 + 2 * norms}
    assert checks.faults(row(sharding="tp=2", **sent), plain) == ["all-reduce: +2 calls and +241 bytes beside plain"]


def test_ratios_within_two_percent_of_their_middle_are_constant() -> None:
    assert summary.constancy({1: 0.5, 2: 0.90, 4: 0.88, 8: 0.92}) == "NO: ± 2.2%"
    assert summary.constancy({2: 0.90, 8: 0.92}) == "yes: ± 1.1%"
    assert summary.constancy({1: 0.9, 2: 0.9}) == "needs two sizes"


def test_summary() -> None:
    wanted_ones = launches(sizes=[2, 4], kinds=["full_shard"], strong=16)
    four = {"gpus": 4, "device": "4 x GPU"}
    rows = [
        *(row(side="plain-fsdp2", ms=90.0), row()),
        *(row(side="plain-fsdp2", ms=91.0, **four), {**row(**four), "failed": "out of memory"}),
    ]
    for key in ("ms", "peak_GiB"):
        del rows[-1][key]
    largest = [
        {
            "world_size": 2,
            "side": "flat",
            "layers": 44,
            "billions": 9.17,
            "predicted": 72.2,
            "measured": 71.4,
            "fits": True,
        },
        {"world_size": 4, "side": "flat", "failed": "no answer"},
    ]
    predicted = {("llama-tiny@3x16 4 microbatch(es)", "flat", "full_shard", 2): 9.9}
    page = summary.page(wanted_ones, rows, predicted, largest)
    assert "| weak | llama-tiny@3x16 | full_shard | flat | 0.900 (100 ms) |  | needs two sizes |" in page
    assert "| llama-tiny@3x16 4 microbatch(es) | full_shard | 2 | flat | 9.90 | 10.00 | -1.0% |" in page
    assert "| 2 | flat | 44 | 9.17 | 72.20 | 71.40 | yes |" in page
    assert "| 4 | flat |  |  |  |  | no answer |" in page
    assert "* 4 x full_shard: llama-tiny@3x16 4 microbatch(es), flat: failed: out of memory" in page


class Stand:
    """In torchrun's place: measures the rows that are missing one after another, until one that it cannot."""

    def __init__(self, cannot: str, said: bool) -> None:
        self.cannot, self.said, self.starts = cannot, said, 0

    def __call__(self, gpus: int, arguments: list[str], *, tick: Any) -> str:
        self.starts += 1
        path = Path(arguments[arguments.index("--output") + 1])
        there = [json.loads(line)["side"] for line in path.read_text().splitlines()] if path.exists() else []
        for side in ("plain-fsdp2", "flat", "block"):
            if side in there:
                continue
            if side == self.cannot and not self.said:
                return "RuntimeError: boom"
            added = row(side=side, **({"failed": "out of memory"} if side == self.cannot else {}))
            with path.open("a") as file:
                file.write(json.dumps(added) + "\n")
            tick()
            if side == self.cannot:
                return "exit code 1"
        return ""


@pytest.mark.parametrize("said", [True, False])
def test_a_case_that_fails_is_a_row_and_the_rest_goes_on(said: bool, tmp_path: Path, capsys: Any) -> None:
    """Whether the benchmark has written the row itself (no memory) or has died."""
    options = argparse.Namespace(
        folder=tmp_path, device="cuda", commit="abc", patience=1, minutes=None, retry=False, steps=1, warmup=1
    )
    ours = measuring.Measuring(options, {"name": "GPU", "gpus": 2, "GiB": 80.0})
    ours._torchrun = stand = Stand("flat", said)  # type: ignore[assignment]
    (launch,) = launches(sizes=[2], kinds=["full_shard"], sides=["flat", "block"])
    ours.measure(launch)
    rows = ours.rows_of([launch])
    assert [r["side"] for r in rows] == ["plain-fsdp2", "flat", "block"]
    assert [r.get("failed") for r in rows] == [None, "out of memory" if said else "RuntimeError: boom", None]
    assert stand.starts == 2
    ours.measure(launch)
    assert stand.starts == 2, "nothing was missing"
    assert "FAILED" in capsys.readouterr().out
    options.retry = True
    assert [r["side"] for r in measuring.Measuring(options, ours.host)._missing(launch)] == ["flat"]


def started(code: str, tmp_path: Path, monkeypatch: Any, **limits: float) -> str:
    """What is said of a Python program in torchrun's place."""
    monkeypatch.setattr(running, "TORCHRUN", ("-c", code))
    asked = {"patience": 60.0, "deadline": math.inf, **limits}
    return running.torchrun(2, [], cpu=True, log=tmp_path / "log.txt", tick=lambda: False, **asked)


def test_what_torchrun_ended_with(tmp_path: Path, monkeypatch: Any) -> None:
    assert started("print('fine')", tmp_path, monkeypatch) == ""
    told = "import sys; print('[rank1]: torch.OutOfMemoryError: CUDA out of memory.', file=sys.stderr); sys.exit(1)"
    assert started(told, tmp_path, monkeypatch) == "torch.OutOfMemoryError: CUDA out of memory."
    assert started("raise SystemExit(3)", tmp_path, monkeypatch) == "exit code 3 without an error; see the log"
    start = time.monotonic()
    assert started("import time; time.sleep(60)", tmp_path, monkeypatch, patience=1.0) == "no progress for 1 s"
    with pytest.raises(running.TimeIsUp):
        started("import time; time.sleep(60)", tmp_path, monkeypatch, deadline=time.monotonic() + 1)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("sharding", ["full_shard", "hsdp=64x8", "tp=2"])
def test_one_of_512_ranks_sends_what_plain_training_sends(sharding: str) -> None:
    """The planner's fakes. Under tensor parallelism: and the norms of three rows of each group, those of a block together."""
    sides = cases.parse(
        "llama-tiny:plain-fsdp2,flat,block,layer", microbatches=2, checkpointing=False,
        sharding=meshes.parse(sharding, 512),
    )  # fmt: skip
    plain, *private = (predictions.predicted(predictions.step_of(case, 512, on_gpu=True)) for case in sides)
    for found, groups, together in zip(private, (1, 3, 21), (1, 3, 5), strict=True):
        split = sharding == "tp=2"
        calls = plain["calls"] | {"all-reduce": plain["calls"].get("all-reduce", 0) + split * together}
        sent = plain["bytes"] | {"all-reduce": plain["bytes"].get("all-reduce", 0) + split * groups * 5 * 3 * 8}
        assert {"all-reduce": 0} | found["calls"] == calls
        assert {"all-reduce": 0} | found["bytes"] == sent


def test_a_step_that_cannot_be_planned_has_no_prediction() -> None:
    (case,) = cases.parse(
        "llama-tiny:flat", microbatches=1, checkpointing=False, sharding=meshes.parse("full_shard", 2)
    )
    case = dataclasses.replace(case, shape=dataclasses.replace(case.shape, rows=0))
    found = predictions.predicted_or_why_not(predictions.step_of(case, 2, on_gpu=False))
    assert found["GiB"] is None and "called without a row" in found["failed"]


def test_no_gpu_is_said_in_a_sentence() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="no GPU here; `--device cpu` tries everything"):
        running.describe_host("cuda")
