"""One row of results: median step after warm-up, its spread, memory, rates and collectives."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fsdp_dp.benchmark import compiling, meshes, peers, profiling, sides
from fsdp_dp.benchmark.cases import Case
from fsdp_dp.benchmark.collectives import Collectives
from fsdp_dp.benchmark.feeding import Feed
from fsdp_dp.benchmark.models import flops


def measure(case: Case, device: torch.device, *, warmup: int, steps: int, profile: bool) -> dict[str, Any]:
    """Run a case and take it down again; times are of the slowest rank's clock, memory of this rank."""
    feed = Feed(case, device, meshes.data_rank(meshes.mesh_of(case.sharding, device.type)))
    if case.compiled:
        compiling.forget()
    step, end, compared = sides.build(case, device, feed)
    try:
        row = _row(case, step, device, feed, warmup=warmup, steps=steps)
        row["replicas"] = compared()
        return row | ({"profile": profiling.account(step)} if profile else {})
    finally:
        gc.unfreeze()
        end()
        del step, end, compared
        release(device)


def _row(
    case: Case, step: Callable[[], None], device: torch.device, feed: Feed, *, warmup: int, steps: int
) -> dict[str, Any]:
    for _ in range(warmup):
        step()
    graphs = compiling.settle(step) if case.compiled else None
    with Collectives() as collectives:
        step()
    gc.collect()
    gc.freeze()  # or Python's collector walks the model's objects in one step of a dozen, for 0.2 s
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = sorted(timed(step, device) for _ in range(steps))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    differs = peers.differs(case)
    return {
        "case": case.name,
        "model": case.model,
        "side": case.side,
        "sharding": case.sharding.name,
        "gpus": dist.get_world_size(),
        "rows": case.shape.rows,
        "tokens": case.shape.tokens,
        "microbatches": case.microbatches,
        "steps": steps,
        "ms": round(statistics.median(times), 2),
        "ms_range": [round(times[0], 2), round(times[-1], 2)],
        "peak_GiB": round(peak / 2**30, 2),
        **_rates(case, statistics.median(times)),
        **(_rows_of(feed, steps, sum(times), device) if case.loader else {}),
        "collectives": dict(collectives.counts),
        "collectives_MB": {kind: round(sent / 1e6, 1) for kind, sent in collectives.sent.items()},
        "collectives_bytes": dict(collectives.sent),
        **({"graphs": graphs} if graphs else {}),
        **({"differs": differs} if differs else {}),
    }


def _rates(case: Case, ms: float) -> dict[str, float]:
    rows = case.shape.rows * case.microbatches / case.sharding.tensor
    return {
        "tokens_per_s_per_gpu": round(rows * case.shape.tokens / ms * 1e3, 1),
        "model_TFLOPs_per_gpu": round(rows * flops(case.shape) / ms / 1e9, 2),
    }


def _rows_of(feed: Feed, steps: int, ms: float, device: torch.device) -> dict[str, float]:
    """Real rows a second, of all data-parallel ranks, and the share of padding: of the timed steps together."""
    counts = torch.tensor([sum(feed.rows[-steps:]), sum(feed.places[-steps:])], dtype=torch.float64, device=device)
    dist.all_reduce(counts)
    rows, places = counts.tolist()
    return {"rows_per_s": round(rows / ms * 1e3, 2), "padding": round(1 - rows / places, 4)}


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Milliseconds of a step that all ranks begin together."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    took = torch.tensor(1e3 * (time.perf_counter() - start), dtype=torch.float64, device=device)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file of JSON lines."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
