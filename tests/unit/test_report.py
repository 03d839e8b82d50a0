"""`python -m fsdp_dp.report`: states what the ledger proves, and without diagnostics nothing that ε does not cover.

Docstrings say what was broken on purpose to see a test fail.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fsdp_dp.composition import cost
from fsdp_dp.data.config import DataConfig
from fsdp_dp.ledger import LEDGER_FILE, Ledger
from fsdp_dp.models.config import GPTConfig, HuggingFaceConfig, ResNetConfig
from fsdp_dp.report import main
from fsdp_dp.reporting.figures import EPSILON, figures, label
from fsdp_dp.reporting.run import read_run
from fsdp_dp.training.app import privacy_config
from fsdp_dp.training.run_folder import CONFIG_FILE, METRICS_FILE, write_config
from fsdp_dp.training.schema import ClippingOptions, PrivacyOptions, TrainConfig

STEPS = 4


def make_run(
    folder: Path,
    *,
    private: bool = True,
    loss: float = 3.25,
    seed: int | None = None,
    block_size: int = 128,
    noise_multiplier: float = 1.0,
    **changes: Any,
) -> Path:
    """A folder as fsdp_dp.train leaves it, checkpoints apart; un-noised metrics depend on `loss`."""
    folder.mkdir(parents=True)
    privacy_options = (
        PrivacyOptions(noise_multiplier=noise_multiplier, seed=seed) if private else PrivacyOptions(mechanism="none")
    )
    options = {"model": GPTConfig(block_size=block_size), "privacy": privacy_options, "steps": STEPS, "batch_size": 10}
    config = TrainConfig(**options | changes)
    write_config(config, folder)
    lines = [
        {"step": step, "epsilon": step / 10 if private else None, "learning_rate": 0.1,
         "outside_the_guarantee": {
             "training_bits_per_byte": loss, "rows_per_second": 7 * loss, "useful_rows": loss / 9, "clipped": loss / 8,
             "memory_gib": loss, **{f"norm_{level}": loss * level for level in (10, 50, 90)},
         }}
        for step in range(1, STEPS + 1)
    ]  # fmt: skip
    lines.append({"step": STEPS, "epsilon": 0.4, "rows": 9, "outside_the_guarantee": {"held_out_bits_per_byte": loss}})
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if private:
        privacy = privacy_config(config, 1000)
        assert privacy is not None
        with released(Ledger(folder / LEDGER_FILE)) as ledger:
            ledger.begin(privacy, noise_multiplier, lease=5)
            ledger.reserve(0)
            ledger.close(STEPS)
    return folder


@contextmanager
def released(ledger: Ledger) -> Iterator[Ledger]:
    """Let go of its lock at the end, as the process does that wrote it."""
    yield ledger
    os.close(ledger._lock)


def written(folder: Path) -> tuple[str, str]:
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def test_runs_side_by_side(tmp_path, capsys):
    run, plain = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", private=False)
    assert main([str(run), str(plain), "--output", str(tmp_path / "out")]) == 0
    markdown, html = written(tmp_path / "out")
    assert "|  | run (1) | run (2) |" in markdown
    epsilon = re.findall(r"epsilon = ([\d.]+) at delta = 1e-06", markdown)[0]
    lower, upper = (
        float(re.findall(rf"epsilon, {side} bound \| ([\d.]+)", markdown)[0]) for side in ("lower", "upper")
    )
    assert 0 < lower < upper == pytest.approx(float(epsilon), rel=1e-3)
    for stated in (
        "NOT PRIVATE: plain training", "one packed row of 129 bytes", "adding or removing one row of 1000",
        "probability 0.01", "epsilon cross-checked: prv", "| numerics | certified", "4, the budget fixed at the start",
        "ok: 3 records, unbroken", "Not detected: an old copy", "## Privacy statement: run (1)", "Signed: ___",
        "loss, bits per byte: held-out (dots), training (thin) (not private",
        "useful rows: those run that were no padding (not private", "clipped rows (not private",
        "rows' gradient norms over the bound: median, and 10 to 90 % (band) (not private",
        "peak memory of a rank (not private", "throughput (not private", "held-out bits per byte (not private", "3.250",
    ):  # fmt: skip
        assert stated in markdown
    assert html.count("data:image/png;base64,") == markdown.count("![") == 7
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", html)
    HTMLParser().feed(html)
    assert "ledger ok" in capsys.readouterr().out


def test_without_diagnostics_nothing_depends_on_unnoised_data(tmp_path):
    """Seen to fail when the held-out row of the overview was shown all the same."""
    pages = []
    for loss in (3.25, 5.75):
        run = make_run(tmp_path / str(loss) / "run", loss=loss)
        assert main([str(run), "--no-diagnostics"]) == 0
        assert {path.name for path in (run / "report").iterdir()} == {"report.md", "report.html", "epsilon.png"}
        pages.append([re.sub("run [0-9a-f]{16}", "run", page) for page in written(run / "report")])
    assert pages[0] == pages[1]


def test_a_ledger_that_does_not_hold_leaves_no_epsilon(tmp_path, capsys):
    for break_it in (
        Path.unlink,
        lambda path: path.write_text(path.read_text().replace('"released": 4', '"released": 3')),
    ):
        run = make_run(tmp_path / str(len(list(tmp_path.iterdir()))))
        break_it(run / LEDGER_FILE)
        assert main([str(run), "--no-diagnostics"]) == 1
        assert "NO EPSILON CAN BE STATED" in capsys.readouterr().out
        markdown, _ = written(run / "report")
        assert "FAILED" in markdown and "epsilon =" not in markdown and "Signed" not in markdown


def test_a_fixed_seed_is_no_guarantee(tmp_path):
    run = make_run(tmp_path / "run", seed=3)
    assert main([str(run), "--no-diagnostics"]) == 0
    assert "NO PRIVACY GUARANTEE: seed fixed" in written(run / "report")[0]


def test_nominal_numerics_are_said_wherever_epsilon_is(tmp_path, capsys):
    """Seen to fail: the claim, green, and the table of runs side by side gave the bare number."""
    run = make_run(tmp_path / "run", privacy=PrivacyOptions(noise_multiplier=1.0, numerics="nominal"))
    assert main([str(run), "--no-diagnostics"]) == 0
    markdown, html = written(run / "report")
    claims = [line for line in (*markdown.splitlines(), capsys.readouterr().out) if "epsilon = " in line]
    assert len(claims) == 4 and all(
        "nominal numerics: the rounding of the clipping is not bounded" in c for c in claims
    )
    assert 'class="banner note"' in html and 'class="banner good"' not in html


def test_a_budget_that_was_raised_was_not_fixed_at_the_start(tmp_path):
    """Seen to fail: the statement said so all the same, above the reservation that it was raised."""
    run = make_run(tmp_path / "run")
    privacy = privacy_config(TrainConfig(privacy=PrivacyOptions(noise_multiplier=1.0), steps=9, batch_size=10), 1000)
    assert privacy is not None
    with released(Ledger(run / LEDGER_FILE)) as ledger:
        ledger.begin(privacy, 1.0, lease=5)
        ledger.close(STEPS)
    assert main([str(run), "--no-diagnostics"]) == 0
    markdown, _ = written(run / "report")
    assert "| 9, of a budget that was raised after releases had been made (4 are spent) |" in markdown
    assert "fixed at the start" not in markdown and "privacy odometer" in markdown


def test_adaptive_bounds_are_told_as_they_are(tmp_path):
    """Seen to fail: a thousandth of the budget read "0%", R as if it were fixed, and σ as that of the sums."""
    adaptive = ClippingOptions(groups="layer", adaptive={"budget_fraction": 0.001})
    run = make_run(tmp_path / "run", clipping=adaptive)
    assert main([str(run), "--no-diagnostics"]) == 0
    markdown, _ = written(run / "report")
    assert "at most R = 0.5 at the start; each layer to a bound of its own" in markdown
    assert "for which 0.1 % of each release's privacy is spent" in markdown
    assert "σ = 1; on the sums 1.0005" in markdown


def test_there_is_nothing_to_sign_where_nothing_is_guaranteed(tmp_path):
    """Seen to fail for a fixed seed and for no noise."""
    for name, options in (("seeded", {"seed": 3}), ("silent", {"noise_multiplier": 0.0})):
        run = make_run(tmp_path / name, **options)
        assert main([str(run), "--no-diagnostics"]) == 0
        markdown, html = written(run / "report")
        assert "NO PRIVACY GUARANTEE" in markdown and "Signed" not in markdown and 'class="banner bad"' in html


def test_who_bounds_epsilon_is_said(tmp_path):
    """Seen to fail: of 4 releases with σ = 3000, prv bounds nothing and pld does, and the statement named prv."""
    for name, sigma, words in (
        ("usual", 1.0, "(accountant prv) |"),
        ("small", 3000.0, "or pld where that cannot bound it"),
    ):
        run = make_run(tmp_path / name, noise_multiplier=sigma)
        assert main([str(run), "--no-diagnostics"]) == 0
        markdown, _ = written(run / "report")
        assert words in markdown and ("'prv' cannot bound it" in markdown) == (name == "small")


def test_no_curve_of_epsilon_where_none_can_be_stated(tmp_path):
    """Seen to fail: "ε so far, an upper bound" stood below the sentence that no ε can be stated."""
    broken = make_run(tmp_path / "broken")
    (broken / LEDGER_FILE).unlink()
    sound = make_run(tmp_path / "sound")
    runs = [make_run(tmp_path / "seeded", seed=3), make_run(tmp_path / "silent", noise_multiplier=0.0), broken]
    for run in runs:
        main([str(run), "--no-diagnostics"])
        assert "epsilon.png" not in written(run / "report")[0] and not (run / "report" / "epsilon.png").exists()
    pictures = [figures([read_run(run) for run in shown], EPSILON)[0].png for shown in ([sound], [sound, *runs])]
    assert pictures[0] == pictures[1]


def test_runs_of_images_and_of_pretrained_weights(tmp_path):
    """Each unit is named, what comes from elsewhere too, and what runs on the same images cost together can be said."""
    images = {"model": ResNetConfig(), "data": DataConfig(source="digits")}
    several = [make_run(tmp_path / name, **images) for name in ("first", "second")]
    tuned = HuggingFaceConfig(pretrained="gpt2", block_size=9, lora_rank=2)
    texts = DataConfig(source="hf_text", path="mine", tokenizer="gpt2", rows="one_per_document")
    language = make_run(tmp_path / "language", model=tuned, data=texts)
    assert main([*map(str, several), str(language), "--output", str(tmp_path / "out")]) == 0
    markdown, _ = written(tmp_path / "out")
    for stated in (
        "one image with its label", "one document (its first 10 tokens", "The pretrained weights (gpt2): public",
        "The tokenizer (gpt2): public", "gpt2, pretrained, for language, LoRA of rank 2", "hf_text: mine",
        "| data | digits |",
    ):  # fmt: skip
        assert stated in markdown
    assert any(line.startswith("together: epsilon <= ") for line in cost([read_run(run) for run in several], None))


def test_a_report_without_diagnostics_leaves_no_picture_of_them_beside_it(tmp_path):
    """Seen to fail: the folder to publish held the losses and norms of the report before."""
    run = make_run(tmp_path / "run")
    for options in ([], ["--no-diagnostics"]):
        assert main([str(run), *options]) == 0
    assert {path.name for path in (run / "report").iterdir()} == {"report.md", "report.html", "epsilon.png"}


def test_words_of_a_configuration_are_shown_as_they_are(tmp_path):
    """Seen to fail: the asterisks of a glob made the rest of a page bold, and a line's end made a heading of a path."""
    path = "corpus/**/*.txt|<script>alert(1)</script>\n# Guaranteed `all` **of** it"
    run = make_run(tmp_path / "run", data=DataConfig(source="text_files", path=path))
    assert main([str(run), "--no-diagnostics"]) == 0
    markdown, html = written(run / "report")
    assert "`corpus/**/*.txt\\|<script>alert(1)</script> # Guaranteed 'all' **of** it`" in markdown
    assert (
        "<code>corpus/**/*.txt|&lt;script&gt;alert(1)&lt;/script&gt; # Guaranteed &#x27;all&#x27; **of** it</code>"
        in html
    )
    assert "<script" not in html and "\n# Guaranteed" not in markdown


@pytest.mark.parametrize("name", ["$\\frac{$", "_run", "<b>run", "a|b"])
def test_any_name_of_a_folder(name, tmp_path):
    """Seen to fail: dollars were read as a formula, and a legend leaves out what begins with an underscore."""
    run = read_run(make_run(tmp_path / name))
    (shown,) = figures([run], EPSILON)
    assert shown.png and main([str(tmp_path / name)]) == 0
    assert not label(run).startswith("_")
    assert "<b>run" not in written(tmp_path / name / "report")[1]


@pytest.mark.parametrize(
    "line",
    ["3", "null", "[1]", '{"a": 1}', '{"step": "x"}', '{"step": 1, "outside_the_guarantee": null}', "\0\0", '{"step": 2, "ep',
     '{"step": 2, "epsilon": "abc", "outside_the_guarantee": {}}', '{"step": 2, "epsilon": [], "outside_the_guarantee": {}}'],
)  # fmt: skip
def test_a_damaged_line_of_metrics_is_left_out(line, tmp_path):
    """Seen to fail with a traceback for all but the last few bytes of a line."""
    run = make_run(tmp_path / "run")
    with (run / METRICS_FILE).open("a") as file:
        file.write(f"{line}\n")
    assert main([str(run)]) == 0
    assert "epsilon = 0.4939" in written(run / "report")[0]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (r"(?s).*", ""),
        (r"(?s).*", "[]"),
        ("model:", "modl:"),
        ("data:", "data:\n  fancy: 1"),
        (r"(?s)optimizer:.*", ""),
    ],
)
def test_a_damaged_configuration_is_said(before, after, tmp_path, capsys):
    """Seen to fail with a traceback."""
    run = make_run(tmp_path / "run")
    config = run / CONFIG_FILE
    config.write_text(re.sub(before, after, config.read_text(), count=1))
    assert main([str(run)]) == 1
    assert "config.yaml is damaged, or of another version of fsdp_dp" in capsys.readouterr().err


def test_metrics_that_are_ahead_of_a_ledger_leave_no_epsilon(tmp_path):
    """Seen to fail: a ledger that was cut before a raise of its budget proved the smaller one."""
    run = make_run(tmp_path / "run")
    with (run / METRICS_FILE).open("a") as file:
        file.write(json.dumps({"step": STEPS + 1, "epsilon": 0.5, "outside_the_guarantee": {}}) + "\n")
    assert main([str(run)]) == 1
    markdown, _ = written(run / "report")
    assert "counts 4 releases, and metrics.jsonl beside it tells of step 5" in markdown and "epsilon =" not in markdown


def test_what_is_no_run_is_said(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert f"{tmp_path} holds no run" in capsys.readouterr().err
