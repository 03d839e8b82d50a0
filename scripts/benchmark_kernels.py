"""The kernels over (a, g) on one GPU, for a block's Linears: each layer by itself, all together, and cuBLAS' plain products.

python scripts/benchmark_kernels.py

Random bf16, medians of 20 after warm-up, ms; host: microseconds until a launch has been given. Needs a Hopper GPU and Triton.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fsdp_dp.kernels import outer

# (name, rows, positions, width, hidden)
BLOCKS = [("1.3B", 16, 1024, 2048, 5504), ("6.7B", 2, 1024, 4096, 11008), ("1280 x 5120", 20, 100, 1280, 5120)]


def milliseconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(23):
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def host_microseconds(run: Callable[[], object]) -> float:
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(60):
        run()
    took = time.perf_counter() - start
    torch.cuda.synchronize()
    return took / 60 * 1e6


def measure(name: str, rows: int, positions: int, width: int, hidden: int) -> None:
    def random(columns: int) -> Tensor:
        return torch.randn(rows, positions, columns, device="cuda").bfloat16()

    inputs: list[tuple[Tensor, list[Tensor]]] = [  # attention's three, its output, gate and up, down
        (random(width), [random(width) for _ in range(3)]),
        (random(width), [random(width)]),
        (random(width), [random(hidden) for _ in range(2)]),
        (random(hidden), [random(width)]),
    ]
    pairs = [(a, g) for a, gs in inputs for g in gs]
    outs = [torch.empty(g.shape[2], a.shape[2], device="cuda") for a, g in pairs]
    sums = [(a, g, out) for (a, g), out in zip(pairs, outs, strict=True)]
    weight = torch.rand(rows, device="cuda")

    def norms(parts: list[list[tuple[Tensor, list[Tensor]]]]) -> Tensor:
        found = outer.GhostNorms(rows, weight.device)
        for part in parts:
            found.add(part)
        return found.terms()

    runs: dict[str, Callable[[], object]] = {
        "sums, alone": lambda: [outer.weighted_outers([one], weight) for one in sums],
        "sums, together": lambda: outer.weighted_outers(sums, weight),
        "cuBLAS, float32": lambda: [
            torch.mm(g.flatten(0, 1).T, a.flatten(0, 1), out_dtype=torch.float32) for a, g in pairs
        ],
        "Grams, alone": lambda: norms([[one] for one in inputs]),
        "Grams, together": lambda: norms([inputs]),
    }
    for what, run in runs.items():
        print(f"{name:12} {what:16} {milliseconds(run):7.3f} ms   host {host_microseconds(run):6.0f} us")


def main() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("benchmark_kernels: needs a Hopper GPU (compute capability 9.0)")
    print(torch.cuda.get_device_name(), torch.__version__)
    for block in BLOCKS:
        measure(*block)


if __name__ == "__main__":
    main()
