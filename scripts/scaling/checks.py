"""What must hold of a row: replicas with the same bits and, beside plain training, its collectives."""

from __future__ import annotations

from collections.abc import Sequence

from fsdp_dp.benchmark.report import Row
from scripts.scaling.wanted import PLAIN

NORMS = 5 * 8
"""Bytes of a row in all-reduces of norms under tensor parallelism: float64 [5, B] a group (docs/norms_across_ranks.md)."""


def faults(row: Row, plain: Row | None) -> list[str]:
    """What does not hold, in words."""
    if "failed" in row:
        return []
    found = ["replicas differ"] if row["replicas"] == "differ" else []
    if row["side"] != PLAIN and plain is not None:
        found += _collectives(row, plain)
    return found


def _collectives(row: Row, plain: Row) -> list[str]:
    found = []
    for kind in sorted({*row["collectives"], *plain["collectives"]}):
        calls, sent = (row[key].get(kind, 0) - plain[key].get(kind, 0) for key in ("collectives", "collectives_bytes"))
        may = row["sharding"].startswith("tp=") and kind == "all-reduce"
        if (calls, sent) != (0, 0) and not (may and are_norms(calls, sent, row["rows"])):
            found.append(f"{kind}: {calls:+} calls and {sent:+} bytes beside plain")
    return found


def are_norms(calls: int, sent: int, rows: int) -> bool:
    """Whether these may be all-reduces of norms, each of one group or of several."""
    return 0 < calls * NORMS * rows <= sent and sent % (NORMS * rows) == 0


def plain_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """Plain training of the same case, where it was measured."""
    same = ("case", "sharding", "gpus", "device", "commit")
    found = [r for r in rows if r["side"] == PLAIN and "failed" not in r and all(r[key] == row[key] for key in same)]
    return found[-1] if found else None


def line(row: Row, plain: Row | None) -> str:
    """A row on the console."""
    name = f"{row['gpus']} x {row['sharding']}: {row['case']}, {row['side']}"
    if "failed" in row:
        return f"{name}: FAILED: {row['failed']}"
    told = [f"{row['ms']:.1f} ms"]
    told += [f"{plain['ms'] / row['ms']:.3f} of plain's speed"] if plain and row["side"] != PLAIN else []
    told += [f"{row['peak_GiB']:.2f} GiB"] if row["peak_GiB"] else []
    told += ["replicas bit-identical"] if row["replicas"] == "identical" else []
    norms = " but for norms" if row["sharding"].startswith("tp=") else ""
    told += [f"collectives as plain{norms}"] if plain and row["side"] != PLAIN and not _collectives(row, plain) else []
    told += [f"CHECK FAILED: {fault}" for fault in faults(row, plain)]
    return f"{name}: {', '.join(told)}"
