"""Weak and strong scaling on the GPUs of one host, private beside plain training:

    python -m scripts.scaling

Starts torchrun on 1, 2, 4 and 8 GPUs, as far as there are so many: Llama-like 1.3B and 6.7B, flat, block and layer clipping
beside plain FSDP2; FULL_SHARD, HSDP (two copies), TP=2 x FSDP. Then the largest model that the planner says will train on so
many, plain and private. After each case it says whether replicas have the same bits and whether communication is that of
plain training; in the end it writes FOLDER/summary.md: ratios by number of GPUs, predicted beside measured memory.

The same command goes on where it was ended: what FOLDER holds for this commit and device is not measured again. A case that
runs out of memory or fails becomes a row that says so. Needs torch and this checkout alone. Exit status: 1 where a check or a
case has failed, 3 where --minutes were over, else 0.

    python -m scripts.scaling --device cpu --gpus 1 2 4     # the same on gloo with a tiny model: ten minutes on two cores
    python -m scripts.scaling --predict --gpus 1 2 4 8      # only what the planner says, which needs no GPU
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path

from scripts.scaling import checks, summary, wanted
from scripts.scaling.measuring import Measuring
from scripts.scaling.planning import plan
from scripts.scaling.running import ROOT, TimeIsUp, describe_host

MODELS = {"cuda": ["llama-1.3b", "llama-6.7b"], "cpu": ["llama-tiny"]}


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("scaling: told to end"))
    options.folder.mkdir(parents=True, exist_ok=True)
    host = {} if options.predict else describe_host(options.device)
    launches = wanted.launches(
        _sizes(options, host),
        options.shardings,
        options.models or MODELS[options.device],
        options.sides,
        options.weak,
        options.strong,
    )
    measuring = Measuring(options, host)
    if not options.predict:
        _measure(measuring, launches, options)
    rows = measuring.rows_of(launches)
    predicted = plan(launches, options.folder / "predicted.jsonl", options.commit, on_gpu=options.device == "cuda")
    text = summary.page(launches, rows, predicted, measuring.largest())
    (options.folder / "summary.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nThis page: {options.folder / 'summary.md'}; rows, log and predictions are beside it.")
    sys.exit(any("failed" in row or checks.faults(row, checks.plain_of(row, rows)) for row in rows))


def _measure(measuring: Measuring, launches: list[wanted.Launch], options: argparse.Namespace) -> None:
    try:
        for launch in launches:
            measuring.measure(launch)
        for gpus in dict.fromkeys(launch.gpus for launch in launches) if options.largest else ():
            for side in ("plain", *options.sides):
                measuring.find_largest(gpus, side)
    except TimeIsUp:
        print("Time is up: the same command goes on from here.", flush=True)
        sys.exit(3)


def _sizes(options: argparse.Namespace, host: dict) -> list[int]:
    if options.predict or options.device == "cpu":
        return options.gpus or [1, 2, 4]
    if max(options.gpus or [1]) > host["gpus"]:
        raise SystemExit(f"scaling: --gpus {max(options.gpus)}, found {host['gpus']} on this host")
    return options.gpus or [n for n in (1, 2, 4, 8) if n <= host["gpus"]]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "outputs" / "scaling", help="what is kept, and gone on from"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--gpus", type=int, nargs="+", metavar="N", help="default: 1 2 4 8, as far as there are so many"
    )
    parser.add_argument("--models", nargs="+", help="as python -m fsdp_dp.benchmark takes them, say llama-1.3b@8x1024")
    parser.add_argument("--sides", nargs="+", choices=wanted.PRIVATE, default=list(wanted.PRIVATE))
    parser.add_argument("--shardings", nargs="+", choices=wanted.SHARDINGS, default=list(wanted.SHARDINGS))
    parser.add_argument("--weak", type=int, default=4, help="microbatches of a step on every GPU (default: 4)")
    parser.add_argument(
        "--strong", type=int, default=8, help="microbatches of a step on all GPUs together (default: 8)"
    )
    parser.add_argument("--steps", type=int, default=6, help="that are timed")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--no-largest", dest="largest", action="store_false", help="leave out the largest models")
    parser.add_argument("--memory-gib", type=float, help="let torch have no more of a card, for the largest models")
    parser.add_argument("--patience", type=float, default=900, help="seconds without a row until a case has failed")
    parser.add_argument("--minutes", type=float, help="end after so long; the same command goes on")
    parser.add_argument("--retry", action="store_true", help="measure again what has failed")
    parser.add_argument("--predict", action="store_true", help="plan only; no GPU is needed")
    parser.add_argument("--commit", default=_commit(), help="what the rows say they were measured on")
    return parser.parse_args()


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
