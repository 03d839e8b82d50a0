"""Lines of docs/reproductions.md on speed and memory, out of the newest rows of docs/benchmarks.jsonl."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from fsdp_dp.benchmark.meshes import FULL_SHARD
from scripts.reproduce.rows import ROOT, Row, read

BENCHMARKS = ROOT / "docs" / "benchmarks.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """One line of the table.

    Args:
        title: what is tried.
        case: `MODEL@ROWSxTOKENS` of the benchmark, without its number of microbatches; under full sharding.
        ours, peers: sides of the benchmark, and what they are called.
        paper, differs: what the paper reports, and in what this is another experiment.
        microbatches: of the command that measures it.
    """

    title: str
    case: str
    ours: Mapping[str, str]
    peers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    paper: str = ""
    differs: str = ""
    microbatches: int = 1

    @property
    def command(self) -> str:
        model = self.case.partition("@")[0]
        name = self.case if "/" in model else model  # whole models have the rows and tokens of the case
        sides = ",".join(["plain-fsdp2", *self.ours, *self.peers])
        return (
            f"torchrun --nproc-per-node=2 -m fsdp_dp.benchmark {name}:{sides} --microbatches {self.microbatches} "
            "--output docs/benchmarks.jsonl"
        )

    def cells(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """Title, ours, the paper's, peers', what differs, date and commit, command."""
        case = f"{self.case} {self.microbatches} microbatch(es)"
        of_case = [row for row in rows if row["case"] == case and row.get("sharding", FULL_SHARD) == FULL_SHARD]
        newest = {row["side"]: row for row in of_case}  # rows are in the order in which they were measured
        used = [newest[side] for side in (*self.ours, *self.peers) if side in newest]
        differs = [self.differs, *(f"{row['side']}: {row['differs']}" for row in used if "differs" in row)]
        return (
            self.title,
            "; ".join(_figures(self.ours, newest, of_case)),
            self.paper,
            "; ".join(_figures(self.peers, newest, of_case)),
            "; ".join(filter(None, differs)),
            "; ".join(dict.fromkeys(map(_stamp, used))),
            f"`{self.command}`",
        )


def _figures(sides: Mapping[str, str], newest: Mapping[str, Row], rows: Sequence[Row]) -> Iterator[str]:
    """Each side's speed and memory beside plain training of the same commit, device and number of microbatches."""
    for side, name in sides.items():
        row = newest.get(side)
        if row is None:
            yield f"{name}: not measured yet"
        elif "failed" in row:
            yield f"{name}: {row['failed']}"
        else:
            yield f"{name}: {_beside_plain(row, rows)}"


def _beside_plain(row: Row, rows: Sequence[Row]) -> str:
    same = ("case", "commit", "device")
    beside = [r for r in rows if r["side"] == "plain-fsdp2" and "ms" in r and all(r[key] == row[key] for key in same)]
    if not beside:
        return f"{row['ms']:.0f} ms, with no plain training beside it"
    plain = beside[-1]
    memory = f", {row['peak_GiB'] / plain['peak_GiB']:.2f} of its memory" if plain["peak_GiB"] else ""
    return f"{plain['ms'] / row['ms']:.3f} of plain's speed{memory}"


def _stamp(row: Row) -> str:
    date = f"{row['date']}, " if "date" in row else ""
    microbatches = row["case"].rpartition(" microbatch")[0].rpartition(" ")[2]
    return f"{date}{row['device']}, torch {row['torch']}, `{row['commit']}`, microbatches: {microbatches}"


def measured() -> list[Row]:
    return read(BENCHMARKS)
