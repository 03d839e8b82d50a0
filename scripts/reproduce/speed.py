"""The lines of docs/reproductions.md that are about speed and memory: the newest rows of docs/benchmarks.jsonl."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from fsdp_dp.benchmark import report
from scripts.reproduce.rows import ROOT

ROWS = ROOT / "docs" / "benchmarks.jsonl"
PEERS = {"opacus": "Opacus, ghost clipping", "opacus-hooks": "Opacus, gradients of every row stored"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedLine:
    """One case of the benchmark, against plain FSDP2 in the same run.

    Args:
        case: as the rows name it.
        sides: ours; whatever `PEERS` were measured stand beside them.
        paper, differs: what the paper reports, and in what this is another experiment.
    """

    title: str
    case: str
    sides: Sequence[str]
    paper: str
    differs: str

    def cells(self) -> Iterable[str]:
        """In the order of the page's columns; of a side, its last row in the file counts."""
        rows = [row for row in report.read(ROWS) if row["case"] == self.case and "ms" in row]
        newest = {row["side"]: row for row in rows}
        ours = [newest[side] for side in self.sides if side in newest]
        peers = [row for side, row in newest.items() if side in PEERS]
        return (
            self.title,
            "; ".join(f"{row['side']}: {_against_plain(row, rows)}" for row in ours) or "not measured yet",
            self.paper,
            "; ".join(f"{PEERS[row['side']]}: {_against_plain(row, rows)}" for row in peers),
            self.differs,
            "; ".join(dict.fromkeys(f"{row['device']}, `{row['commit']}`" for row in (*ours, *peers))),
            "; ".join(dict.fromkeys(f"`{row['command']}`" for row in (*ours, *peers))),
        )


def _against_plain(row: report.Row, rows: Sequence[report.Row]) -> str:
    plain = report.baseline(row, [other for other in rows if report.compared(other) == report.compared(row)])
    if plain is None:
        return f"{row['ms']:.0f} ms a step, plain not measured beside it"
    return f"{plain['ms'] / row['ms']:.2f} of the speed, {row['peak_GiB'] / plain['peak_GiB']:.2f} of the memory"
