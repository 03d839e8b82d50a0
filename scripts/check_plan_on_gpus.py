"""Predicted beside measured peak memory: `fsdp_dp.planning` against `torch.cuda.max_memory_allocated` on real GPUs.

    torchrun --standalone --nproc-per-node=2 scripts/check_plan_on_gpus.py [--models 1_3b:8 6_7b:1] [--sides plain flat]

predicts and measures. Predictions take minutes and need no GPU, so that they may be made elsewhere, before:

    python scripts/check_plan_on_gpus.py --predict-for 2 --largest --sides plain flat block > largest.jsonl
    torchrun --standalone --nproc-per-node=2 scripts/check_plan_on_gpus.py --plan largest.jsonl

Needs torch and this package only. A model is a shape and the rows of a microbatch. With `--largest` it is the deepest model
of the 6.7B width that is predicted to fit `--memory-gib` (78) less `--headroom`, for each side. Prints one JSON row a line:
GiB of the largest rank; `first_step` is the peak of the first step, which also runs the checks of the engine and keeps all
records for them (`--first-tokens` gives it shorter rows); `measured` is that of later ones, `off` how far `predicted` is
from it, and `fits` whether all steps stayed within `memory_gib`. A larger card may exceed that and is measured all the same,
unless `--cap` lets torch have no more. Where a rank runs out of memory it says so, and nothing further is measured.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fsdp_dp import PrivacyConfig, make_private
from fsdp_dp.models.build import parameter_count
from fsdp_dp.models.config import GPTConfig
from fsdp_dp.models.objective import row_losses
from fsdp_dp.planning.depth import predict
from fsdp_dp.planning.options import decoder
from fsdp_dp.planning.search import most_layers
from fsdp_dp.planning.trace import Step, build
from fsdp_dp.training.building import build_optimizer
from fsdp_dp.training.schema import PrecisionConfig, ShardingConfig, TrainConfig
from fsdp_dp.training.world import World, describe_world

CUDA = torch.cuda.is_available()
GIB = 2**30
Row = dict[str, Any]
SHAPES = {
    "tiny": {"layers": 2, "heads": 2, "width": 32, "mlp_width": 64},
    "1_3b": {"layers": 24, "heads": 16, "width": 2048, "mlp_width": 5504},
    "6_7b": {"layers": 32, "heads": 32, "width": 4096, "mlp_width": 11008},
}
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="SHAPE:ROWS")
    parser.add_argument("--sides", nargs="+", default=["plain", "flat", "block", "layer"])
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in backward")
    parser.add_argument("--microbatches", type=int, default=1, help="of a step")
    parser.add_argument("--first-tokens", type=int, default=0, help="length of the first step's rows; 0: of all steps")
    parser.add_argument("--memory-gib", type=float, default=78.0, help="of a card, for torch")
    parser.add_argument("--cap", action="store_true", help="let torch have no more than that")
    parser.add_argument("--largest", action="store_true", help="the most blocks of each model's width that fit")
    parser.add_argument("--headroom", type=float, default=0.04, help="share of memory that --largest leaves free")
    parser.add_argument("--fused", action="store_true", help="AdamW in one kernel, without the copies of foreach")
    parser.add_argument("--predict-for", type=int, default=0, metavar="RANKS", help="print predictions alone, for GPUs")
    parser.add_argument("--plan", type=Path, help="measure what --predict-for has printed")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.predict_for:
        for case in cases(options, options.predict_for, on_gpu=True):
            print(json.dumps(case | prediction(case)), flush=True)
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if CUDA else torch.device("cpu")
    if CUDA:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if CUDA else "gloo")
    if CUDA and options.cap:
        memory = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_gib * GIB / memory), device)
    for row in planned(options):
        if row["layers"]:
            row |= compared(row, measured(row, device, options.first_tokens))
        if dist.get_rank() == 0:
            print(json.dumps(row), flush=True)
    dist.destroy_process_group()


def cases(options: argparse.Namespace, ranks: int, *, on_gpu: bool) -> Iterator[Row]:
    """What to predict; without GPUs small things, to try the script."""
    for model in options.models or (["6_7b:1"] if options.largest else ["1_3b:8", "6_7b:1"] if on_gpu else ["tiny:2"]):
        shape, rows = model.split(":")
        for side in options.sides:
            yield {
                "shape": shape,
                "rows": int(rows),
                "tokens": 1024 if on_gpu else 16,
                "side": side,
                "world_size": ranks,
                "on_gpu": on_gpu,
                "checkpointing": options.checkpointing,
                "microbatches": options.microbatches,
                "fused": options.fused,
                "memory_gib": options.memory_gib,
                "usable": int(options.memory_gib * (1 - options.headroom) * GIB) if options.largest else 0,
                "layers": 0,
            }


def planned(options: argparse.Namespace) -> Iterator[Row]:
    """The rows to measure, with their predictions: of the file, or made here by rank 0 before each is measured."""
    ranks = dist.get_world_size()
    if options.plan is None:
        for case in cases(options, ranks, on_gpu=CUDA):
            yield case | from_rank_0(functools.partial(predicted_apart, case))
        return
    for line in options.plan.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["world_size"] != ranks:
            raise SystemExit(f"{options.plan} was predicted for {row['world_size']} ranks, found {ranks}.")
        yield row


def make_step(row: Row) -> Step:
    model = GPTConfig(
        **SHAPES[row["shape"]],
        architecture="llama",
        block_size=row["tokens"],
        vocabulary_size=96 if row["shape"] == "tiny" else 32000,
        norm="rms_norm",
    )
    config = TrainConfig(
        model=replace(model, layers=row["layers"] or model.layers),
        sharding=ShardingConfig(strategy="fully_shard"),
        precision=PrecisionConfig(compute="bf16"),
        device="auto" if row["on_gpu"] else "cpu",
    )
    return Step(
        config=config,
        world_size=row["world_size"],
        side=row["side"],
        microbatch_size=row["rows"],
        accumulates=row["microbatches"] > 1,
        activation_checkpointing=row["checkpointing"],
        fused=row["fused"],
    )


def prediction(case: Row) -> Row:
    step = make_step(case)
    layers = most_layers(step, case["usable"]) if case["usable"] else decoder(step.config).layers
    if not layers:
        return {"layers": 0}
    step = step.with_layers(layers)
    found = predict(step)
    return {
        "layers": layers,
        "billions": parameter_count(step.config.model) / 1e9,
        "predicted": found.peak.total() / GIB,
        "predicted_in": found.peak_segment[0],
        "predicted_held": {kind: round(held / GIB, 2) for kind, held in found.peak.items()},
    }


def predicted_apart(case: Row) -> Row:
    """In a process of its own: fake ranks and real ones do not share one."""
    own = ("RANK", "WORLD", "LOCAL", "MASTER", "TORCHELASTIC")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    call = f"import sys, json, check_plan_on_gpus as c; print(json.dumps(c.prediction({case!r})))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", call],
        env=environment | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def from_rank_0(make: Callable[[], Row]) -> Row:
    box = [make() if dist.get_rank() == 0 else {}]
    dist.broadcast_object_list(box)
    return box[0]


def measured(row: Row, device: torch.device, first_tokens: int) -> Row:
    """Peaks of a few steps of the real thing, in GiB."""
    try:
        return run(make_step(row), row["microbatches"], first_tokens or row["tokens"], device)
    except torch.OutOfMemoryError as error:
        print(f"rank {dist.get_rank()}, {row['side']}: {str(error)[:300]}", file=sys.stderr, flush=True)
        os._exit(1)  # the other ranks wait in a collective: torchrun ends them
    finally:
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def compared(row: Row, found: Row) -> Row:
    if not CUDA:
        return found  # nothing was measured
    fits = max(found["first_step"], found["measured"]) < row["memory_gib"]
    return found | {"off": round(row["predicted"] / found["measured"] - 1, 4), "fits": fits}


def run(step: Step, microbatches: int, first_tokens: int, device: torch.device) -> Row:
    started = time.perf_counter()
    world = describe_world(step.config, device, dist.HashStore())
    model = build(step, replace(world, device=torch.device("meta")))
    model.to_empty(device=device)
    fill(model)
    optimizer = build_optimizer(model, step.config.optimizer)
    for group in optimizer.param_groups:
        group["foreach"], group["fused"] = CUDA and not step.fused, step.fused
    engine = None
    if step.side != "plain":
        engine = make_private(model, mechanism(step, world), optimizer)

    def one_step(length: int) -> None:
        vocabulary = decoder(step.config).vocabulary_size
        tokens = torch.randint(0, vocabulary, (step.microbatch_size, length), device=device)
        for _ in range(microbatches):
            (row_losses(model(tokens), tokens).mean() / microbatches).backward()
        optimizer.step()
        optimizer.zero_grad()

    length = decoder(step.config).block_size
    first = peak_of(lambda: one_step(first_tokens), device)
    later = max(peak_of(lambda: one_step(length), device) for _ in range(STEPS - 1))
    reserved = torch.cuda.max_memory_reserved() / GIB if CUDA else 0.0
    if engine is not None:
        engine.detach()
    seconds = round(time.perf_counter() - started, 1)
    return {"first_step": first, "measured": later, "reserved": reserved, "seconds": seconds}


@torch.no_grad()
def fill(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.to_local().normal_(std=0.02)
    for buffer in model.buffers():
        buffer.zero_()


def mechanism(step: Step, world: World) -> PrivacyConfig:
    return PrivacyConfig(
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        expected_batch_size=step.microbatch_size * world.size,
        dataset_size=10**6,
        target_delta=1e-7,
        sampling="external_poisson",
        clipping=step.side,
    )


def peak_of(act, device: torch.device) -> float:
    """GiB at the peak, of the rank that needs most."""
    if not CUDA:
        act()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    act()
    torch.cuda.synchronize()
    peak = torch.tensor(torch.cuda.max_memory_allocated() / GIB, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return float(peak)


if __name__ == "__main__":
    main()
