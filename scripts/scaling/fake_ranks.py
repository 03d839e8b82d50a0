"""The table of docs/scaling.md: memory and collectives of one of up to 512 ranks, as the planner has them. No GPU is needed.

    python -m scripts.scaling.fake_ranks docs/scaling.md        # some minutes

Without a page the table is printed. Ends with an error where a private side sends what plain training does not, norms of rows
that tensor parallelism splits apart.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fsdp_dp.benchmark import cases, meshes
from scripts.scaling.checks import are_norms
from scripts.scaling.predictions import all_predicted, step_of
from scripts.scaling.wanted import PLAIN, PRIVATE

MODELS = ("llama-1.3b", "llama-6.7b")
MESHES = {
    "full_shard": dict.fromkeys((2, 8, 64, 512), "full_shard"),
    "hsdp": {4: "hsdp=2x2", 8: "hsdp=2x4", 64: "hsdp=8x8", 512: "hsdp=64x8"},
    "tp": dict.fromkeys((2, 8, 64, 512), "tp=2"),
}
SIDES = (PLAIN, *PRIVATE)
HEAD = ("model", "sharding", "ranks", "plain, GiB", *(f"{side} / plain" for side in PRIVATE), "collectives")
BEGIN, END = "<!-- from fake ranks: begin -->", "<!-- from fake ranks: end -->"


def main() -> None:
    lines = [(model, name, ranks) for model in MODELS for sizes in MESHES.values() for ranks, name in sizes.items()]
    found = all_predicted([step_of(case, line[-1], on_gpu=True) for line in lines for case in _sides(*line)])
    rows = []
    for line in lines:
        rows.append(_cells(line, [next(found) for _ in SIDES]))
        print(*rows[-1], sep="  ", flush=True)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (HEAD, ["---"] * len(HEAD), *rows))
    for path in map(Path, sys.argv[1:]):
        path.write_text(page(path.read_text(encoding="utf-8"), table), encoding="utf-8")


def _sides(model: str, name: str, ranks: int) -> list[cases.Case]:
    """A step of several microbatches, so that memory is that of the later ones."""
    sharding = meshes.parse(name, ranks)
    return cases.parse(f"{model}:{','.join(SIDES)}", microbatches=2, checkpointing=False, sharding=sharding)


def _cells(line: tuple[str, str, int], found: list[dict[str, Any]]) -> list[str]:
    plain, private = found[0], found[1:]
    (case, *_) = _sides(*line)
    added = [_norms(one, plain, rows=case.shape.rows, split="tp" in line[1]) for one in private]
    sent = "as plain" if not any(added) else f"plain and {', '.join(map(str, added))} all-reduces of norms"
    ratios = [f"{one['GiB'] / plain['GiB']:.3f}" for one in private]
    return [*map(str, line), f"{plain['GiB']:.2f}", *ratios, sent]


def _norms(private: dict[str, Any], plain: dict[str, Any], *, rows: int, split: bool) -> int:
    """All-reduces of norms that a private microbatch has beside the collectives of plain training.

    Raises:
        ValueError: it has others, too.
    """
    more = {
        kind: tuple(private[key].get(kind, 0) - plain[key].get(kind, 0) for key in ("calls", "bytes"))
        for kind in {*private["calls"], *plain["calls"]}
    }
    norms, nbytes = more.pop("all-reduce", (0, 0))
    may = split and are_norms(norms, nbytes, rows)
    if any(map(any, more.values())) or ((norms, nbytes) != (0, 0) and not may):
        raise ValueError(f"private training sends {private}, plain training {plain}")
    return norms


def page(text: str, table: str) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no '{BEGIN}' and '{END}' around the place of the table")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


if __name__ == "__main__":
    main()
