"""`python -m fsdp_dp.report RUN...`: report.md and one self-contained report.html on one run, or on several side by side.

With `--no-diagnostics` the report holds nothing that ε does not cover: it is the one to publish.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fsdp_dp.accounting import AccountingError
from fsdp_dp.models.objective import SCORES
from fsdp_dp.reporting.figures import DIAGNOSTICS, EPSILON, NOT_PRIVATE, figures
from fsdp_dp.reporting.page import Banner, Block, Figures, Heading, Paragraph, Table, as_html, as_markdown, verbatim
from fsdp_dp.reporting.run import Run, read_run
from fsdp_dp.reporting.statement import claim, statement, verdict_banner
from fsdp_dp.training.metrics import series

TITLE = "Training report"
SEVERAL = (
    "Each epsilon is that of one run alone. If the runs used the same data, and more than one of them is seen by anybody, "
    "what they cost together is said by `python -m fsdp_dp.sweep cost RUN...`."
)


def report(runs: Sequence[Run], *, diagnostics: bool) -> list[Block]:
    """The page: the runs side by side, pictures, then a privacy statement for each."""
    blocks: list[Block] = [Heading(1, TITLE), *(named_verdict(run) for run in runs), overview(runs)]
    if len(runs) > 1:
        blocks.append(Paragraph(SEVERAL))
    blocks += [Heading(2, "What epsilon covers"), Figures(tuple(figures(runs, EPSILON)))]
    if diagnostics:
        marked = f"Whatever is marked '{NOT_PRIVATE}' must not leave the circle that may see the data."
        shown = tuple(figures(runs, DIAGNOSTICS))
        blocks += [Heading(2, "Diagnostics, not private"), Banner(marked, "note"), *scores_of(runs), Figures(shown)]
    else:
        blocks.append(Paragraph("Diagnostics that epsilon does not cover are left out."))
    return blocks + [block for run in runs for block in statement(run)]


def named_verdict(run: Run) -> Banner:
    text, tone = verdict_banner(run)
    return Banner(f"{run.name}: {text}", tone)


def overview(runs: Sequence[Run]) -> Table:
    """One column a run: what is public of it."""
    rows = [
        ("guarantee", *map(claim, runs)),
        ("ledger", *(run.verdict for run in runs)),
        ("model", *(run.model.in_words for run in runs)),
        ("data", *(data_in_words(run) for run in runs)),
        ("sharding", *(str(run.config["sharding"]["strategy"]) for run in runs)),
        ("steps, batch", *(f"{run.config['steps']} of {run.config['batch_size']} rows" for run in runs)),
        ("learning rate", *(f"{run.config['optimizer']['learning_rate']:g}" for run in runs)),
    ]
    return Table(("", *(run.name for run in runs)), tuple(rows))


def data_in_words(run: Run) -> str:
    data = run.data
    where = " ".join(verbatim(part) for part in (data.name, data.subset, data.path) if part)
    return f"{data.source}: {where}" if where else data.source


def scores_of(runs: Sequence[Run]) -> list[Table]:
    """The last held-out score of each run, for each kind of score that was recorded."""
    tables = []
    for score in SCORES:
        last = [series(run.records, f"held_out_{score.name}")[1][-1:] for run in runs]
        if any(last):
            cells = [f"{found[0]:.3f}" if found else "not evaluated" for found in last]
            head = ("", *(run.name for run in runs))
            tables.append(Table(head, ((f"held-out {score.title} ({NOT_PRIVATE})", *cells),)))
    return tables


def named_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, numbered where two folders have the same name."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=f"{run.name} ({number})")
        for number, run in enumerate(runs, start=1)
    ]


def write(blocks: Sequence[Block], folder: Path) -> None:
    """report.md with its pictures, and report.html, in `folder`; pictures of an earlier report there are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in (*EPSILON, *DIAGNOSTICS):
        (folder / f"{picture.name}.png").unlink(missing_ok=True)
    for block in blocks:
        if isinstance(block, Figures):
            for figure in block.figures:
                (folder / f"{figure.name}.png").write_bytes(figure.png)
    (folder / "report.md").write_text(as_markdown(blocks), encoding="utf-8")
    (folder / "report.html").write_text(as_html(blocks, TITLE), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 if a run cannot be read or a ledger does not hold together: the report is written all the same."""
    parser = argparse.ArgumentParser(
        prog="python -m fsdp_dp.report",
        description="Report on one run of fsdp_dp.train, or on several side by side: curves, the ledger's verdict, and a "
        "privacy statement for each, to be signed. Writes report.html, one file that holds everything, and report.md with "
        "its pictures. Ends with 1 where a ledger does not hold together.",
        epilog="example: python -m fsdp_dp.report outputs/mine --no-diagnostics   (the one to publish)",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run (output_dir)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: the folder 'report' in the first run's")
    parser.add_argument("--no-diagnostics", action="store_true", help="leave out whatever epsilon does not cover")
    asked = parser.parse_args(arguments)
    folder = asked.output or asked.runs[0] / "report"
    try:
        runs = named_apart([read_run(path) for path in asked.runs])
        write(report(runs, diagnostics=not asked.no_diagnostics), folder)
    except (ValueError, AccountingError, OSError) as error:
        print(f"fsdp_dp.report: {error}", file=sys.stderr)
        return 1
    for run in runs:
        print(f"{run.name}: {claim(run)}; ledger {run.verdict}")
    print(f"written: {folder / 'report.html'} and report.md")
    return 1 if any(run.claimed_private and run.standing is None for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
