"""The page of the results: is the ratio constant, is memory what was predicted, what is the largest model. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fsdp_dp.benchmark.cases import Case
from fsdp_dp.benchmark.report import Row
from scripts.scaling.checks import faults, plain_of
from scripts.scaling.wanted import PLAIN, Launch

CONSTANT = 0.02
"""How far ratios may be from their middle, of 2 GPUs and more."""


def page(
    launches: Sequence[Launch],
    rows: Sequence[Row],
    predicted: Mapping[tuple[Any, ...], float | None],
    largest: Sequence[Row],
) -> str:
    """Everything. ``predicted``: GiB by case, side, sharding and GPUs."""
    sizes = sorted({launch.gpus for launch in launches})
    stamps = dict.fromkeys(f"{row['device']}, torch {row['torch']}, commit `{row['commit']}`" for row in rows)
    sections = [
        "# Scaling",
        "\n".join(f"* {stamp}" for stamp in stamps) or "Nothing was measured.",
        "## Speed of private training beside plain (plain / private), and milliseconds of a step",
        _table([*_LEFT, *(f"{n} GPUs" if n > 1 else "1 GPU" for n in sizes), _LAST], _speeds(launches, rows, sizes)),
        "## Peak memory of a GPU, GiB: predicted / measured",
        _table(["case", "sharding", "GPUs", "side", "predicted", "measured", "off"], _memory(rows, predicted)),
    ]
    if largest:
        head = ["GPUs", "side", "blocks", "billions", "predicted GiB", "measured GiB", "trained"]
        sections += ["## The largest model that trains (width 4096, one row on a GPU, FULL_SHARD)"]
        sections += [_table(head, map(_largest, largest))]
    return "\n\n".join([*sections, "## What did not hold", *(_not_held(rows) or ["Nothing."])]) + "\n"


_LEFT = ["scaling", "model", "sharding", "side"]
_LAST = f"constant from 2 GPUs on (± {CONSTANT:.0%})"


def _speeds(launches: Sequence[Launch], rows: Sequence[Row], sizes: Sequence[int]) -> Iterator[list[str]]:
    found: dict[tuple[str, ...], dict[int, tuple[float | None, float]]] = {}
    for launch in launches:
        for scaling, count in launch.microbatches.items():
            for case in launch.cases():
                row = _row_of(case, launch, rows)
                if case.microbatches != count or row is None or "failed" in row:
                    continue
                plain = plain_of(row, rows)
                kind = launch.sharding.split("=")[0] if launch.sharding.startswith("hsdp") else launch.sharding
                ratio = plain["ms"] / row["ms"] if plain else None
                found.setdefault((scaling, _model(case), kind, case.side), {})[launch.gpus] = ratio, row["ms"]
    for named, cells in sorted(found.items(), key=lambda item: _order(item[0])):
        told = [_speed(*cells[n]) if n in cells else "" for n in sizes]
        yield [*named, *told, "" if named[-1] == PLAIN else constancy({n: cells[n][0] for n in cells})]


def _model(case: Case) -> str:
    return f"{case.model}@{case.shape.rows}x{case.shape.tokens}"


def _order(named: tuple[str, ...]) -> tuple[Any, ...]:
    scaling, model, sharding, side = named
    return scaling != "weak", model, sharding, side != PLAIN, side


def _row_of(case: Case, launch: Launch, rows: Sequence[Row]) -> Row | None:
    wanted = (case.name, case.side, launch.sharding, launch.gpus)
    same = [row for row in rows if (row["case"], row["side"], row["sharding"], row["gpus"]) == wanted]
    return same[-1] if same else None


def _speed(ratio: float | None, ms: float) -> str:
    return f"{ms:.0f} ms" if ratio is None else f"{ratio:.3f} ({ms:.0f} ms)"


def constancy(ratios: Mapping[int, float | None]) -> str:
    """Of sizes from 2 on: how far from the middle of the lowest and the highest."""
    known = [ratio for size, ratio in ratios.items() if size >= 2 and ratio is not None]
    if len(known) < 2:
        return "needs two sizes"
    off = (max(known) - min(known)) / (max(known) + min(known))
    return f"{'yes' if off <= CONSTANT else 'NO'}: ± {off:.1%}"


def _memory(rows: Sequence[Row], predicted: Mapping[tuple[Any, ...], float | None]) -> Iterator[list[str]]:
    for row in rows:
        said = predicted.get((row["case"], row["side"], row["sharding"], row["gpus"]))
        measured = row.get("peak_GiB")
        off = f"{said / measured - 1:+.1%}" if said and measured else ""
        yield [
            *(row["case"], row["sharding"], str(row["gpus"]), row["side"]),
            *("" if said is None else _gib(said), _gib(measured) if measured else row.get("failed", ""), off),
        ]


def _gib(amount: float) -> str:
    return f"{amount:.2f}" if amount >= 1 else f"{amount:.2g}"


def _largest(row: Row) -> list[str]:
    head = [str(row["world_size"]), row["side"]]
    if "failed" in row or not row.get("layers"):
        return [*head, str(row.get("layers", "")), "", "", "", row.get("failed", "not even the shallowest fits")]
    trained = "yes" if row.get("fits", True) else "no: more than the card has"
    found = _gib(row["measured"]) if row.get("measured") else ""
    return [*head, str(row["layers"]), _gib(row["billions"]), _gib(row["predicted"]), found, trained]


def _not_held(rows: Sequence[Row]) -> list[str]:
    found = []
    for row in rows:
        where = f"* {row['gpus']} x {row['sharding']}: {row['case']}, {row['side']}: "
        told = [f"failed: {row['failed']}"] if "failed" in row else faults(row, plain_of(row, rows))
        found += [where + text for text in told]
    return ["\n".join(found)] if found else []


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join([f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)])
