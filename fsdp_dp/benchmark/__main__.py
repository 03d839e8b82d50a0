"""``torchrun --nproc-per-node=2 -m fsdp_dp.benchmark CASE... --output rows.jsonl``: one JSON row a case, resumable.

A case is ``MODEL[/LAYERS][@ROWSxTOKENS]:SIDE,SIDE,...`` (see `cases` and `models`). Needs torch alone, and Opacus for its
side. Rows that ``--output`` already holds for this commit, device and sharding are not measured again. The page of the
results:

    python -m fsdp_dp.benchmark --output docs/benchmarks.jsonl --report docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fsdp_dp.benchmark import cases, measure, meshes, report
from fsdp_dp.benchmark.models import MODELS


def main() -> None:
    options = options_of()
    if options.report:
        options.report.write_text(report.page(options.report.read_text(), report.read(options.output)))
        return
    device = _start()
    ranks = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=2))
    stamp = {**_versions(device), "commit": options.commit, "command": "torchrun " + " ".join(_command())}
    done = {report.key(row) for row in report.read(options.output)}
    for count in options.microbatches:
        for text in options.cases:
            for case in cases.parse(
                text,
                microbatches=count,
                checkpointing=options.checkpointing,
                sharding=options.sharding,
                loader=options.loader,
                compiled=options.compile,
            ):
                if report.key(_named(case) | stamp) not in done:
                    _run(case, device, options, stamp, ranks)
    dist.destroy_process_group()


def _run(
    case: cases.Case, device: torch.device, options: argparse.Namespace, stamp: dict[str, Any], ranks: dist.ProcessGroup
) -> None:
    """Measure a case; one that fails is a row that says so, and the next is measured."""
    profiled = options.profile and case.microbatches == min(options.microbatches)
    row = _named(case)
    failure = None
    try:
        row = measure.measure(case, device, warmup=options.warmup, steps=options.steps, profile=profiled)
    except Exception as error:
        traceback.print_exc()
        first = str(error).strip().partition("\n")[0].split(". ")[0]
        failure = f"{type(error).__name__}: {first}"
    measure.release(device)  # not where the error still holds the model
    try:
        failure = agreed(failure, ranks)
    except TimeoutError:
        reason = f"on rank {dist.get_rank()} alone: {failure}" if failure else "another rank did not come to its end"
        _keep(_named(case) | {"failed": reason} | stamp, options.output)
        raise SystemExit(
            f"benchmark: {case.name}, {case.side}: {reason}, so that ranks wait for each other. Its row says so; run the "
            "same command again for the cases after it"
        ) from None
    if failure:
        row = _named(case) | {"failed": failure}
    if dist.get_rank() == 0:
        _keep(row | stamp, options.output)


def agreed(failure: str | None, ranks: dist.ProcessGroup) -> str | None:
    """The first failure of any rank, over a group of its own: collectives of the case may be left undone.

    Raises:
        TimeoutError: a rank does not answer; it waits for this one inside the case.
    """
    found: list[str | None] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(found, failure, group=ranks)
    except RuntimeError as error:
        raise TimeoutError(str(error)) from error
    return next((other for other in found if other), None)


def _keep(row: dict[str, Any], output: Path | None) -> None:
    print(json.dumps({key: value for key, value in row.items() if key not in ("profile", "command")}), flush=True)
    if output:
        measure.append(output, row)


def _named(case: cases.Case) -> dict[str, Any]:
    return {"case": case.name, "side": case.side, "sharding": case.sharding.name, "gpus": dist.get_world_size()}


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What is asked for; ends the program with what is wrong with it."""
    parser = argparse.ArgumentParser(
        prog="python -m fsdp_dp.benchmark",
        description=__doc__,
        epilog=f"models: {', '.join(MODELS)}\nsides: {', '.join(cases.SIDES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--output", type=Path, help="JSON lines; rows that it holds already are not measured again")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 1], help="of a logical batch")
    parser.add_argument(
        "--sharding", default=meshes.FULL_SHARD, help="full_shard (default), hsdp=RxS (R copies of S shards) or tp=T"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help="recompute every block in backward")
    parser.add_argument("--loader", action="store_true", help="rows come through a loader; real rows a second")
    parser.add_argument("--compile", action="store_true", help="compile every block, before it is sharded")
    parser.add_argument("--profile", action="store_true", help="also account for one step of the fewest microbatches")
    parser.add_argument("--commit", default=_commit(), help="what the rows say they were measured on")
    parser.add_argument("--report", type=Path, help="write the tables of --output into this page instead of measuring")
    options = parser.parse_args(arguments)
    if options.report and not report.read(options.output):
        parser.error(f"--report makes its tables from the rows of --output, and {options.output} has none")
    if not options.report and not options.cases:
        parser.error("name what to measure, such as llama-tiny:plain-fsdp2,flat")
    try:
        options.sharding = meshes.parse(options.sharding, int(os.environ.get("WORLD_SIZE", "1")))
        for text in options.cases:
            cases.parse(
                text,
                microbatches=1,
                checkpointing=False,
                sharding=options.sharding,
                loader=options.loader,
                compiled=options.compile,
            )
    except ValueError as error:
        parser.error(str(error))
    return options


def _start() -> torch.device:
    warnings.filterwarnings("ignore", category=FutureWarning)
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29531"}
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return device


def _versions(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"device": f"{dist.get_world_size()} x {name}", "torch": torch.__version__, "date": today}


def _command() -> list[str]:
    return [f"--nproc-per-node={os.environ['WORLD_SIZE']}", "-m", "fsdp_dp.benchmark", *sys.argv[1:]]


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
