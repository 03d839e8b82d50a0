"""`python -m fsdp_dp.sweep cost|draw|winner`: what it costs in privacy to choose hyper-parameters on private data.

`cost RUN...` adds up runs whose results somebody sees, a grid for example (`fsdp_dp.composition`). `draw` and `winner`
are the other way, that of arXiv 2110.03620: a secret random number of trials, drawn from one distribution, of which only
the best is released, at a cost that hardly grows with their number (`fsdp_dp.selection`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fsdp_dp import composition, selection
from fsdp_dp.accounting import AccountingError
from fsdp_dp.reporting.run import read_run


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where no cost can be stated."""
    asked = parser().parse_args(arguments)
    try:
        if asked.command == "draw":
            lines = selection.draw(asked.choices, eta=asked.eta, mean=asked.mean, output=asked.output)
        elif asked.command == "winner":
            lines = selection.winner(asked.folder)
        else:
            lines = composition.cost([read_run(path) for path in asked.runs], asked.delta)
    except (ValueError, AccountingError) as error:
        print(f"fsdp_dp.sweep: {error}", file=sys.stderr)
        return 1
    print(*lines, sep="\n")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fsdp_dp.sweep", description="What tuning costs in privacy.")
    commands = parser.add_subparsers(dest="command", required=True)
    together = commands.add_parser("cost", help="several runs together, all of them seen")
    together.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    together.add_argument("--delta", type=float, help="default: the runs' own")
    drawn = commands.add_parser("draw", help="list a secret random number of trials, one line of overrides each")
    drawn.add_argument("choices", nargs="+", metavar="NAME=VALUE,VALUE", help="an option and its values")
    drawn.add_argument(
        "--output", type=Path, default=Path("outputs/sweep"), help="a new folder, for the trials' folders"
    )
    drawn.add_argument("--mean", type=float, required=True, help="trials on average")
    drawn.add_argument("--eta", type=float, default=0.0, help="shape: 0 logarithmic, 1 geometric (default: 0)")
    best = commands.add_parser("winner", help="the best of the trials that `draw` listed, the others never seen")
    best.add_argument("folder", type=Path, metavar="FOLDER", help="the --output of `draw`")
    return parser


if __name__ == "__main__":
    sys.exit(main())
