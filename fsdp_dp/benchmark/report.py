"""The rows of `__main__`, the tables of docs/benchmarks.md that are made of them, and their place in the page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fsdp_dp.benchmark.meshes import FULL_SHARD

Row = Mapping[str, Any]

_HEADER = (
    "| side | step (range) | speed | peak memory | of plain | tokens/s a GPU | model TFLOP/s | collectives |",
    "|---|---|---|---|---|---|---|---|",
)


def read(path: Path | None) -> list[dict[str, Any]]:
    """The rows of a file; of rows from before there were other shardings, that of those days."""
    if path is None or not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{"sharding": FULL_SHARD, "gpus": int(row["device"].split(" x ")[0]), **row} for row in rows]


def key(row: Row) -> tuple[Any, ...]:
    """What was measured: there is one row of it."""
    return tuple(row[name] for name in ("case", "side", "sharding", "gpus", "device", "commit"))


_BEGIN, _END = "<!-- from rows: begin -->", "<!-- from rows: end -->"


def page(text: str, rows: Sequence[Row]) -> str:
    """``text`` with the tables of these rows between its two marks.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(
            f"report: the page has no '{_BEGIN}' and '{_END}' around the place of the tables; put them there"
        )
    return f"{before}{begin}\n\n{tables(rows)}\n\n{end}{after}"


def tables(rows: Sequence[Row]) -> str:
    """One table a case, commit and sharding, whose sides are compared; then where the time of the profiled steps went."""
    sections = []
    for case in dict.fromkeys(map(compared, rows)):
        of_case = [row for row in rows if compared(row) == case]
        below = [*_real_rows(of_case), *_differences(of_case), *_account(of_case)]
        sections.append("\n".join([f"## {case[0]}", "", *_stamp(of_case), "", *_HEADER, *_lines(of_case), *below]))
    return "\n\n".join(sections)


def compared(row: Row) -> tuple[Any, ...]:
    """Rows in which this is the same stand in one table."""
    return tuple(row[name] for name in ("case", "commit", "device", "sharding"))


def _stamp(rows: Sequence[Row]) -> list[str]:
    """Number of GPUs and their name, sharding, versions, commit and command; once where the rows agree."""
    stamps = dict.fromkeys(
        ", ".join([row["device"], row["sharding"], f"torch {row['torch']}", f"commit `{row['commit']}`"])
        for row in rows
    )
    return [*stamps, "", *(f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows))]


def baseline(row: Row, rows: Sequence[Row]) -> Row | None:
    """Plain training on the same sharding; Opacus is compared with plain FSDP2."""
    side = "plain-fsdp1" if row["side"].endswith("fsdp1") else "plain-fsdp2"
    return next((other for other in rows if other["side"] == side and "ms" in other), None)


def _lines(rows: Sequence[Row]) -> Iterable[str]:
    for row in rows:
        if "failed" in row:
            yield f"| {row['side']} | {row['failed']} | | | | | | |"
            continue
        plain = baseline(row, rows)
        speed = f"{plain['ms'] / row['ms']:.3f}" if plain else ""
        memory = f"{row['peak_GiB'] / plain['peak_GiB']:.3f}" if plain and plain["peak_GiB"] else ""
        sent = ", ".join(f"{n} {kind} ({row['collectives_MB'][kind]:.0f} MB)" for kind, n in row["collectives"].items())
        yield (
            f"| {row['side']} | {row['ms']:.1f} ms ({row['ms_range'][0]:.1f} to {row['ms_range'][1]:.1f}) | {speed} | "
            f"{row['peak_GiB']:.2f} GiB | {memory} | {row['tokens_per_s_per_gpu']:.0f} | "
            f"{row['model_TFLOPs_per_gpu']:.1f} | {sent} |"
        )


def _real_rows(rows: Sequence[Row]) -> list[str]:
    """Through a loader: what a user gets."""
    return [
        line
        for row in rows
        if "rows_per_s" in row
        for line in ("", f"{row['side']}: {row['rows_per_s']} rows a second on all GPUs; padding {row['padding']:.1%}.")
    ]


def _differences(rows: Sequence[Row]) -> list[str]:
    """In what sides did not run what the others ran."""
    return [line for row in rows if "differs" in row for line in ("", f"{row['side']}: {row['differs']}.")]


def _account(rows: Sequence[Row]) -> list[str]:
    profiled = {row["side"]: row["profile"] for row in rows if row.get("profile", {}).get("launches")}
    if not profiled:
        return []
    kinds = list(dict.fromkeys(kind for found in profiled.values() for kind in found["ms"]))
    lines = ["", "| ms of one step | " + " | ".join(profiled) + " |", "|---|" + "---|" * len(profiled)]
    for kind in kinds:
        lines.append(f"| {kind} | " + " | ".join(str(found["ms"].get(kind, 0)) for found in profiled.values()) + " |")
    for key in ("exposed communication", "idle", "whole", "launches"):
        lines.append(f"| {key} | " + " | ".join(str(found[key]) for found in profiled.values()) + " |")
    return lines
