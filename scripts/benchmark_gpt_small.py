"""GPT-2-small's shape in bf16, private beside plain, in one process group: exactness, training, time and memory.

    torchrun --standalone --nproc-per-node=2 scripts/benchmark_gpt_small.py [--output FILE] [--profile FOLDER]

Needs torch and this package only. On CPU it runs a tiny model, to try the script. Prints one JSON row a line:
`exact` compares one release with a float64 per-sample loop, `train` follows the loss over private releases on the
standard library's sources, `time` gives the median step of plain and private training, and `kernels` (with --profile)
what the GPU itself does in one step. docs/benchmarks.md quotes them.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fsdp_dp import PrivacyConfig, make_private
from fsdp_dp.data.config import DataConfig
from fsdp_dp.data.corpus import load_corpus
from fsdp_dp.models.config import GPTConfig
from fsdp_dp.models.gpt import GPT
from fsdp_dp.models.objective import row_losses
from fsdp_dp.training.building import shard_fsdp1, shard_fsdp2
from fsdp_dp.training.schema import PrecisionConfig, ShardingConfig, TrainConfig
from fsdp_dp.training.world import World

BACKENDS = {"FSDP1": "full_shard", "FSDP2": "fully_shard"}
CUDA = torch.cuda.is_available()
SMALL = GPTConfig(layers=12, heads=12, width=768, mlp_width=3072, block_size=1024, embeddings="tied")
TINY = GPTConfig(layers=2, heads=2, width=32, mlp_width=72, block_size=48, embeddings="tied", vocabulary_size=61)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="append the rows to this file as JSON lines")
    parser.add_argument("--commit", default=commit(), help="what the rows say they were measured on")
    parser.add_argument("--profile", type=Path, help="also write the costliest kernels and traces of a step here")
    options = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if CUDA else torch.device("cpu")
    if CUDA:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if CUDA else "gloo", device_id=device if CUDA else None)
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("data",))
    world = World(rank=rank, size=size, device=device, data_mesh=mesh, tensor_mesh=None)
    model = SMALL if CUDA else TINY
    batches = ((16, 1), (16, 4)) if CUDA else ((4, 1), (4, 2))
    for backend in BACKENDS:
        for compute in ("fp32", "bf16"):
            emit(options, exactness(backend, compute, world))
        for microbatch_size, microbatches in batches:
            emit(options, timing(backend, model, microbatch_size, microbatches, world))
        emit(options, training(backend, model, world, steps=20 if CUDA else 3))
    if options.profile:
        for side in ("plain", "private"):
            emit(options, profile(side, model, *batches[0], world, options.profile))
    dist.destroy_process_group()


def emit(options: argparse.Namespace, row: dict[str, object]) -> None:
    if dist.get_rank():
        return
    row |= {"torch": torch.__version__, "world_size": dist.get_world_size(), "commit": options.commit}
    row["device"] = torch.cuda.get_device_name() if CUDA else "CPU"
    print(json.dumps(row), flush=True)
    if options.output:
        with options.output.open("a") as file:
            file.write(json.dumps(row) + "\n")


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def build(backend: str, model: GPTConfig, compute: str, world: World) -> torch.nn.Module:
    config = TrainConfig(
        model=model, sharding=ShardingConfig(strategy=BACKENDS[backend]), precision=PrecisionConfig(compute=compute)
    )
    torch.manual_seed(0)
    module = GPT(model).to(world.device)
    return (shard_fsdp1 if backend == "FSDP1" else shard_fsdp2)(module, config, world)


def mechanism(
    rows: int, noise_multiplier: float, max_grad_norm: float = 1.0, dataset_size: int = 10**6
) -> PrivacyConfig:
    return PrivacyConfig(
        max_grad_norm=max_grad_norm,
        noise_multiplier=noise_multiplier,
        expected_batch_size=rows,
        dataset_size=dataset_size,
        target_delta=1e-7,
        sampling="external_poisson",
    )


def tokens(rows: int, model: GPTConfig, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, model.vocabulary_size, (rows, model.block_size + 1), generator=generator).to(device)
    return drawn[:, :-1], drawn[:, 1:]


def exactness(backend: str, compute: str, world: World) -> dict[str, object]:
    """One noiseless release of 3 rows a rank against a float64 loop over the rows, on the tiny model."""
    bound, rows = 0.5, 3
    inputs, targets = tokens(rows * world.size, TINY, 7, world.device)
    torch.manual_seed(0)
    reference = GPT(TINY).to(world.device)
    if compute == "bf16":
        reference.to(torch.bfloat16)
    expected = clipped_sum(reference.double(), inputs, targets, bound)

    module = build(backend, TINY, compute, world)
    engine = make_private(module, mechanism(rows * world.size, 0.0, bound))
    before = whole(module)
    mine = slice(rows * world.rank, rows * (world.rank + 1))
    row_losses(module(inputs[mine]), targets[mine]).mean().backward()
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    after = whole(module)
    moved = {name: (before[name] - after[name]).double() * rows * world.size for name in before}
    off = math.sqrt(sum(float((moved[n] - expected[n]).square().sum()) for n in expected))
    size = math.sqrt(sum(float(x.square().sum()) for x in expected.values()))
    engine.detach()
    return {"row": "exact", "backend": backend, "precision": compute, "relative_error": off / size}


def clipped_sum(
    model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor, bound: float
) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i in range(len(inputs)):
        loss = row_losses(model(inputs[i : i + 1]), targets[i : i + 1]).sum()
        grads = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        for name, grad in grads.items():
            total[name] += min(1.0, bound / norm) * grad
    return total


def whole(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, gathered, by the unwrapped model's names."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.tensor import DTensor

    if isinstance(module, FSDP):
        with FSDP.summon_full_params(module, writeback=False):
            named = {name: p.detach().clone() for name, p in module.named_parameters()}
        return {name.replace("_fsdp_wrapped_module.", ""): p for name, p in named.items()}
    full = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in module.named_parameters()}
    return {name: p.detach().clone() for name, p in full.items()}


def step_function(backend: str, side: str, model: GPTConfig, microbatch_size: int, microbatches: int, world: World):
    module = build(backend, model, "bf16", world)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    engine = None
    if side == "private":
        engine = make_private(module, mechanism(microbatch_size * microbatches * world.size, 1.0), optimizer)
    data = [tokens(microbatch_size, model, 100 * world.rank + i, world.device) for i in range(microbatches)]

    def step() -> None:
        for inputs, targets in data:
            row_losses(module(inputs), targets).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, engine


def timing(backend: str, model: GPTConfig, microbatch_size: int, microbatches: int, world: World) -> dict[str, object]:
    row: dict[str, object] = {"row": "time", "backend": backend, "microbatch_size": microbatch_size}
    row |= {"microbatches": microbatches, "tokens_per_row": model.block_size}
    for side in ("plain", "private"):
        step, engine = step_function(backend, side, model, microbatch_size, microbatches, world)
        for _ in range(5):
            step()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        times = [timed(step) for _ in range(20)]
        row[f"{side}_ms"] = round(statistics.median(times), 2)
        row[f"{side}_ms_range"] = [round(min(times), 2), round(max(times), 2)]
        row[f"{side}_peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2) if CUDA else None
        if engine is not None:
            engine.detach()
        del step, engine
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    row["speed"] = round(row["plain_ms"] / row["private_ms"], 3)  # type: ignore[operator]
    return row


def timed(step) -> float:
    if CUDA:
        torch.cuda.synchronize()
    dist.barrier()
    start = time.perf_counter()
    step()
    if CUDA:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def training(backend: str, model: GPTConfig, world: World, steps: int) -> dict[str, object]:
    """Private releases on real text through the engine's loader: the loss must go down."""
    corpus = load_corpus(DataConfig(), model)
    rows = 512 if CUDA else 8
    module = build(backend, model, "bf16", world)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    privacy = PrivacyConfig(
        max_grad_norm=1.0,
        noise_multiplier=0.5,
        expected_batch_size=rows,
        dataset_size=len(corpus.train),
        target_delta=1e-6,
        steps=steps,
    )
    engine = make_private(module, privacy, optimizer)
    bits = []
    for logical_batch in engine.loader(corpus.train, microbatch_size=32 if CUDA else 4):
        losses = []
        for inputs, targets in logical_batch:
            loss = row_losses(
                module(inputs.to(world.device) % model.vocabulary_size),
                targets.to(world.device) % model.vocabulary_size,
            ).mean()
            loss.backward()
            losses.append(float(loss) / math.log(2))
        optimizer.step()
        optimizer.zero_grad()
        bits.append(statistics.mean(losses))
    engine.detach()
    return {"row": "train", "backend": backend, "releases": engine.steps, "bits_first": bits[0], "bits_last": bits[-1]}


def profile(
    side: str, model: GPTConfig, microbatch_size: int, microbatches: int, world: World, folder: Path
) -> dict[str, object]:
    """One FSDP2 step under the profiler: its costliest operations and its trace go into `folder`, totals into a row."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    step, engine = step_function("FSDP2", side, model, microbatch_size, microbatches, world)
    for _ in range(5):
        timed(step)
    with profiler(activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if CUDA else [])) as found:
        timed(step)
    if engine is not None:
        engine.detach()
    row: dict[str, object] = {"row": "kernels", "backend": "FSDP2", "side": side, "microbatch_size": microbatch_size}
    if world.rank:
        return row
    folder.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(folder / f"{side}.json.gz"))
    orders = ["self_cuda_time_total", "self_cpu_time_total"] if CUDA else ["self_cpu_time_total"]
    tables = [found.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90) for order in orders]
    (folder / f"{side}.txt").write_text("\n".join(tables))
    with gzip.open(folder / f"{side}.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "nccl" not in e["name"]]
    return row | {"launches": len(kernels), "kernel_ms": round(sum(e["dur"] for e in kernels) / 1e3, 2)}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
