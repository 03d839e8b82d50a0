"""`sweep draw` and `sweep winner`: what theorem 2 of arXiv 2110.03620 needs, as far as a program can see it.

Docstrings say what was seen to fail.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fsdp_dp import sweep
from fsdp_dp.accounting import Mechanism
from fsdp_dp.ledger import LEDGER_FILE
from fsdp_dp.models.config import ResNetConfig
from fsdp_dp.selection import DRAW_FILE
from fsdp_dp.training.run_folder import METRICS_FILE
from fsdp_dp.training.schema import PrivacyOptions
from fsdp_dp.tuning import Trial, gamma_for, selection_epsilon
from tests.unit.test_report import make_run

CHOICES = ("optimizer.learning_rate=1e-3,1e-2", "privacy.max_grad_norm=0.1,1")


def drawn(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[list[str]]:
    """The trials of a draw, each as its overrides."""
    assert sweep.main(["draw", "--output", str(folder), *options, *CHOICES]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def trained(folder: Path, names: dict[str, float], **changes: Any) -> None:
    """A sweep of trials that ended with these held-out losses."""
    folder.mkdir()
    draw = {"eta": 0.0, "mean": 5.0, "trials": dict.fromkeys(names, "optimizer.learning_rate=1e-3")}
    (folder / DRAW_FILE).write_text(json.dumps(draw))
    for name, loss in names.items():
        make_run(folder / name, loss=loss, **changes)


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert sweep.main(["winner", str(folder)]) == 1
    said = capsys.readouterr()
    assert not said.out
    return said.err


def test_the_best_is_chosen_and_nothing_of_the_others_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "sweep", {"aaaa": float("nan"), "bbbb": 3.25, "cccc": 5.75, "dddd": 4.5})
    assert sweep.main(["winner", str(tmp_path / "sweep")]) == 0
    out = capsys.readouterr().out
    expected = selection_epsilon(Trial(Mechanism(1.0, 0.01), 4), 1e-6, eta=0.0, gamma=gamma_for(5, eta=0.0))
    stated = re.findall(r"as the best of 5 trials on average .*: epsilon <= ([\d.]+) at delta = 1e-06", out)
    assert float(stated[0]) == pytest.approx(expected, rel=1e-5)
    assert "adding or removing one row" in out and "one packed row of 129 bytes" in out
    assert "bbbb" in out and not any(word in out for word in ("aaaa", "cccc", "dddd", "3.25", "4.5", " 4 trials"))
    assert "stays secret" in out and "nothing of the other trials is seen" in out
    assert "Its training losses, norms and times are not covered" in out


def test_accuracy_is_best_where_it_is_most(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "sweep", {"aaaa": 0.5, "bbbb": 0.75})
    for metrics in tmp_path.glob(f"sweep/*/{METRICS_FILE}"):
        metrics.write_text(metrics.read_text().replace("bits_per_byte", "accuracy"))
    assert sweep.main(["winner", str(tmp_path / "sweep")]) == 0
    out = capsys.readouterr().out
    assert "held-out accuracy" in out and "bbbb" in out and "aaaa" not in out


def test_all_trials_that_were_drawn_have_to_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seen to fail without `check_complete`, and without each look at a ledger: one run alone proves nothing of a sweep."""
    folder = tmp_path / "sweep"
    trained(folder, {"aaaa": 4.5, "bbbb": 3.25})
    make_run(folder / "cccc", loss=5.75)
    assert "cccc was not drawn" in refused(folder, capsys)
    shutil.rmtree(folder / "cccc")
    kept = (folder / "aaaa" / METRICS_FILE).read_text()
    (folder / "aaaa" / METRICS_FILE).write_text("".join(kept.splitlines(keepends=True)[:-1]))
    assert "aaaa has no held-out bits per byte at its end" in refused(folder, capsys)
    (folder / "aaaa" / METRICS_FILE).write_text(kept)
    ledger = (folder / "aaaa" / LEDGER_FILE).read_text()
    (folder / "aaaa" / LEDGER_FILE).write_text("".join(ledger.splitlines(keepends=True)[:-1]))
    assert "aaaa did not run to its end" in refused(folder, capsys)
    (folder / "aaaa" / LEDGER_FILE).unlink()
    assert "aaaa: no cost can be stated" in refused(folder, capsys)
    shutil.rmtree(folder / "aaaa")
    assert "aaaa did not run" in refused(folder, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 64}, "rows must be the same"),
        ({"batch_size": 20}, "options that do not vary must be the same"),
        ({"steps": 5}, "did not run to its end"),
        ({"privacy": PrivacyOptions(noise_multiplier=1.0, target_delta=1e-5)}, "options that do not vary must be"),
        ({"privacy": PrivacyOptions(noise_multiplier=1.0, numerics="nominal")}, "options that do not vary must be"),
        ({"seed": 1}, "its seed was fixed"),
        ({"private": False}, "no cost can be stated"),
    ],
)
def test_trials_of_different_cost_are_no_sweep(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen to fail without `require_same`: a cheap winner would hide a dear trial."""
    trained(tmp_path / "sweep", {"aaaa": 3.25, "bbbb": 4.5})
    shutil.rmtree(tmp_path / "sweep" / "bbbb")
    make_run(tmp_path / "sweep" / "bbbb", loss=4.5, **changes)
    assert message in refused(tmp_path / "sweep", capsys)


def test_runs_that_were_not_drawn_have_no_winner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "sweep" / "0")
    assert "is not the folder of a sweep that `draw` drew" in refused(tmp_path / "sweep", capsys)


def test_trials_are_drawn_only_over_what_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = drawn(tmp_path / "sweep", capsys, "--mean", "30")
    for rate, clipped, folder in lines:
        assert rate.split("=")[1] in ("1e-3", "1e-2") and clipped.split("=")[1] in ("0.1", "1")
        assert re.fullmatch(
            rf"output_dir={tmp_path}/sweep/[0-9a-f]{{16}}", folder
        )  # a number would tell of their number
    assert len({folder for *_, folder in lines}) == len(lines)
    record = json.loads((tmp_path / "sweep" / DRAW_FILE).read_text())
    assert (record["eta"], record["mean"], len(record["trials"])) == (0.0, 30.0, len(lines))
    for forbidden in ("privacy.noise_multiplier=1,2", "steps=10,20", "batch_size=8", "model=gpt_small", "data=text_files",
                      "model.block_size=8,16", "privacy=eps1,eps8", "privacy.seed=1", "optimizer.learning_rate"):  # fmt: skip
        assert sweep.main(["draw", "--mean", "3", "--output", str(tmp_path / "none"), forbidden]) == 1
        assert "must not vary" in capsys.readouterr().err or "=" not in forbidden
        assert not (tmp_path / "none").exists()


def test_a_value_brings_no_other_option_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seen to fail: the line of that trial read `optimizer.learning_rate=1e-3 steps=5000`."""
    choice = "optimizer.learning_rate=1e-3 steps=5000,1e-2"
    assert sweep.main(["draw", "--mean", "3", "--output", str(tmp_path / "sweep"), choice]) == 1
    assert "no white space" in capsys.readouterr().err


def test_a_sweep_is_drawn_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seen to fail: a second draw listed folders of the first again, and what was there stayed in the sweep."""
    drawn(tmp_path / "sweep", capsys, "--mean", "3")
    assert sweep.main(["draw", "--mean", "3", "--output", str(tmp_path / "sweep"), *CHOICES]) == 1
    assert "to draw again for a sweep that has begun is to choose its number" in capsys.readouterr().err


def test_a_folder_that_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (
        "{",
        "[]",
        "{}",
        '{"eta": 0.0, "mean": 0.5, "trials": {"a": ""}}',
        '{"eta": 0, "mean": 5, "trials": {}}',
    ):
        (tmp_path / DRAW_FILE).write_text(text)
        assert "is not the folder of a sweep" in refused(tmp_path, capsys)


def test_images_have_a_winner_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fsdp_dp.data.config import DataConfig

    trained(tmp_path / "sweep", {"aaaa": 0.5}, model=ResNetConfig(), data=DataConfig(source="digits"))
    assert sweep.main(["winner", str(tmp_path / "sweep")]) == 0
    assert "one image with its label" in capsys.readouterr().out
