"""Predicted beside measured peak memory: `fsdp_dp.planning` against `torch.cuda.max_memory_allocated` on real GPUs.

    torchrun --standalone --nproc-per-node=2 scripts/check_plan_on_gpus.py [--models 1_3b:8 6_7b:1] [--sides plain flat]
    torchrun --standalone --nproc-per-node=2 scripts/check_plan_on_gpus.py --largest [--memory-gib 79.2]

Needs torch and this package only. A model is a shape and the rows of a microbatch. With `--largest` it is the deepest model
of the 6.7B width that is predicted to fit, for each side, and `--memory-gib` lets torch have no more than that of a larger
card. Prints one JSON row a line: GiB of the largest rank; `first_step`
is the peak of the first step, which also runs the checks of the engine; `measured` that of later ones.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

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
TOKENS = 1024 if CUDA else 16
SHAPES = {
    "tiny": {"layers": 2, "heads": 2, "width": 32, "mlp_width": 64},
    "1_3b": {"layers": 24, "heads": 16, "width": 2048, "mlp_width": 5504},
    "6_7b": {"layers": 32, "heads": 32, "width": 4096, "mlp_width": 11008},
}
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["1_3b:8", "6_7b:1"] if CUDA else ["tiny:2"])
    parser.add_argument("--sides", nargs="+", default=["plain", "flat", "block", "layer"])
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in backward")
    parser.add_argument("--microbatches", type=int, default=1, help="of a step")
    parser.add_argument("--memory-gib", type=float, default=0.0, help="what torch may reserve on a card; 0: all")
    parser.add_argument("--largest", action="store_true", help="the most blocks of the first model that fit")
    parser.add_argument("--headroom", type=float, default=0.04, help="share of memory that --largest leaves free")
    parser.add_argument("--predict", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.predict:
        print(json.dumps(prediction(**json.loads(options.predict))))
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if CUDA else torch.device("cpu")
    if CUDA:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if CUDA else "gloo")
    memory = torch.cuda.get_device_properties(device).total_memory if CUDA else 2**30
    if CUDA and options.memory_gib:
        torch.cuda.set_per_process_memory_fraction(options.memory_gib * GIB / memory, device)
        memory = int(options.memory_gib * GIB)
    usable = int(memory * (1 - options.headroom))
    for model in options.models:
        shape, rows = model.split(":")
        for side in options.sides:
            case = {"shape": shape, "rows": int(rows), "side": side, "world_size": dist.get_world_size()}
            case |= {"checkpointing": options.checkpointing, "usable": usable if options.largest else 0}
            case |= {"microbatches": options.microbatches}
            row = case | from_rank_0(lambda case=case: predicted_apart(case))
            row |= (
                measured(make_step(**case, layers=row["layers"]), options.microbatches, device) if row["layers"] else {}
            )
            if dist.get_rank() == 0:
                print(json.dumps(row), flush=True)
    dist.destroy_process_group()


def make_step(
    shape: str, rows: int, side: str, world_size: int, checkpointing: bool, usable: int, microbatches: int, layers: int
) -> Step:
    model = GPTConfig(
        **SHAPES[shape], architecture="llama", block_size=TOKENS, vocabulary_size=32000 if CUDA else 96, norm="rms_norm"
    )
    config = TrainConfig(
        model=replace(model, layers=layers or model.layers),
        sharding=ShardingConfig(strategy="fully_shard"),
        precision=PrecisionConfig(compute="bf16"),
        device="auto" if CUDA else "cpu",
    )
    return Step(
        config=config,
        world_size=world_size,
        side=side,
        microbatch_size=rows,
        accumulates=microbatches > 1,
        activation_checkpointing=checkpointing,
    )


def prediction(**case: object) -> dict[str, object]:
    """Runs in a process of its own: fake ranks and real ones do not share one."""
    step = make_step(**case, layers=0)  # type: ignore[arg-type]
    layers = most_layers(step, int(case["usable"])) if case["usable"] else decoder(step.config).layers  # type: ignore[call-overload]
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


def predicted_apart(case: dict[str, object]) -> dict[str, object]:
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "LOCAL", "MASTER", "TORCHELASTIC"))
    }
    command = [sys.executable, __file__, "--predict", json.dumps(case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def from_rank_0(make) -> dict[str, object]:
    box = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]  # type: ignore[return-value]


def measured(step: Step, microbatches: int, device: torch.device) -> dict[str, object]:
    """Peaks of a few steps of the real thing; an out-of-memory error on any rank is a result too."""
    row: dict[str, object] = {}
    try:
        row["first_step"], row["measured"], row["reserved"] = run(step, microbatches, device)
        if row["measured"]:
            row["ok"] = True
    except torch.OutOfMemoryError as error:
        print(f"rank {dist.get_rank()}: {str(error)[:200]}", file=sys.stderr, flush=True)
        os._exit(1)  # the other ranks wait in a collective: torchrun ends them
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    return row


def run(step: Step, microbatches: int, device: torch.device) -> tuple[float, float, float]:
    world = describe_world(step.config, device, dist.HashStore())
    model = build(step, replace(world, device=torch.device("meta")))
    model.to_empty(device=device)
    fill(model)
    optimizer = build_optimizer(model, step.config.optimizer)
    engine = None
    if step.side != "plain":
        engine = make_private(model, mechanism(step, world), optimizer)
    shape = (step.microbatch_size, decoder(step.config).block_size)
    tokens = torch.randint(0, decoder(step.config).vocabulary_size, shape, device=device)

    def one_step() -> None:
        for _ in range(microbatches):
            (row_losses(model(tokens), tokens).mean() / microbatches).backward()
        optimizer.step()
        optimizer.zero_grad()

    first = peak_of(one_step, device)
    later = max(peak_of(one_step, device) for _ in range(STEPS - 1))
    reserved = torch.cuda.max_memory_reserved() / GIB if CUDA else 0.0
    if engine is not None:
        engine.detach()
    return first, later, reserved


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
