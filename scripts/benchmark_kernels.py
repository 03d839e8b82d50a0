"""The kernels over (a, g) on one GPU, for a block's Linears: each layer by itself, all together, and cuBLAS' plain products.

python scripts/benchmark_kernels.py           all of it
python scripts/benchmark_kernels.py formed    only the gradients of rows, formed: one layer, long rows, with TFLOP/s
python scripts/benchmark_kernels.py tied      only a table that is also the head: what is measured beside the head's own norm

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

from fsdp_dp import gradients
from fsdp_dp.kernels import instantiate, outer, tied
from fsdp_dp.norm_terms import NormTerms
from fsdp_dp.numerics import exact_arithmetic

# (name, rows, positions, width, hidden)
BLOCKS = [("1.3B", 16, 1024, 2048, 5504), ("6.7B", 2, 1024, 4096, 11008), ("1280 x 5120", 20, 100, 1280, 5120)]

# (rows, positions, width in, width out)
LAYERS = [(B, T, 2048, P) for B, T in ((16, 1024), (4, 4096), (2, 8192), (1, 16384)) for P in (2048, 5504)]

# (name, rows, positions, width, vocabulary)
TIES = [
    ("GPT-2", 16, 1024, 768, 50_257),
    ("GPT-2-large", 20, 1024, 1280, 50_257),
    ("one long row", 1, 8192, 2048, 50_257),
]


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


def measure_formed(rows: int, positions: int, width: int, hidden: int) -> None:
    """Ways to a layer's norms and weighted sum through the gradients of its rows, part by part, and through Grams."""
    a, g = (torch.randn(rows, positions, columns, device="cuda").bfloat16() for columns in (width, hidden))
    weight, keep = torch.rand(rows, device="cuda"), torch.ones(rows, dtype=torch.bool, device="cuda")
    out = torch.empty(hidden, width, device="cuda")
    product = 2 * rows * positions * width * hidden

    def grams() -> Tensor:
        found = outer.GhostNorms(rows, a.device)
        found.add([(a, [g])])
        return found.terms()

    def reference() -> list[Tensor]:
        return [gradients._instantiated_norms(x, y).stack() for x, y in zip(a.split(1), g.split(1), strict=True)]

    stored = torch.bmm(g.mT, a, out_dtype=torch.float32)  # type: ignore[call-overload]
    rounded = stored.bfloat16()
    by_hand = instantiate.hand_scheduled(a.device)
    runs: dict[str, Callable[[], object]] = {
        "bmm, float32": lambda: torch.bmm(g.mT, a, out_dtype=torch.float32),  # type: ignore[call-overload]
        "bmm, bfloat16": lambda: torch.bmm(g.mT, a),
        "dropped, torch": reference,
        "dropped, kernel": lambda: outer.instantiated_norms([(a, g)]),
        "lengths alone": lambda: instantiate._lengths([a, g]),
        "stored, float32": lambda: outer.stored_rows(a, g, torch.float32),
        "stored, bfloat16": lambda: outer.stored_rows(a, g, torch.bfloat16),
        "norm of stored, torch": lambda: gradients.Materialized(stored).norm_terms(),
        "sum of stored, torch": lambda: gradients.Materialized(stored).weighted_sum(weight, keep),
        "sum of float32": lambda: outer.weighted_rows(stored, weight, out),
        "sum of bfloat16": lambda: outer.weighted_rows(rounded, weight, out),
        "Gram": grams,
        "sum of factors": lambda: outer.weighted_outers([(a, g, out)], weight),
    }
    if by_hand:
        for what in ("dropped, kernel", "stored, float32", "stored, bfloat16"):
            runs[f"{what}, Triton"] = _by_triton(runs[what])
    name = f"{rows} x {positions}, {width} x {hidden}"
    for what, run in runs.items():
        took = milliseconds(run)
        rate = "" if "sum of stored" in what or "lengths" in what else f"{product / took / 1e9:6.0f} TFLOP/s"
        print(f"{name:24} {what:25} {took:7.3f} ms   {rate}")


def _by_triton(run: Callable[[], object]) -> Callable[[], object]:
    """The same by the kernel that Triton schedules."""

    def by_triton() -> object:
        before, instantiate.hand_scheduled = instantiate.hand_scheduled, lambda device: False
        try:
            return run()
        finally:
            instantiate.hand_scheduled = before

    return by_triton


def measure_tied(name: str, rows: int, positions: int, width: int, vocabulary: int) -> None:
    """The cross term, the table's norm and their bounds, by the kernels and in torch; words as frequent as in a text."""
    a, h = (torch.randn(rows, positions, width, device="cuda").bfloat16() for _ in range(2))
    g = torch.randn(rows, positions, vocabulary, device="cuda", dtype=torch.bfloat16)
    index = (vocabulary ** torch.rand(rows, positions, device="cuda") - 1).long().clamp(max=vocabulary - 1)
    table = gradients.IndexedRows.compress(index, h, vocabulary)
    both = gradients.TiedSum(gradients.OuterProduct(a, g), table)
    head = NormTerms.zeros(rows, a.device)
    runs: dict[str, Callable[[], object]] = {
        "table, compressed": lambda: gradients.IndexedRows.compress(index, h, vocabulary),
        "tied, torch": lambda: (both._inner_product(), table.norm_terms()),
        "tied, kernels": lambda: tied.norm_terms(a, g, table.value_BTP, table.index_BT, head),
    }
    for what, run in runs.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        took = milliseconds(run)
        room = (torch.cuda.max_memory_allocated() - before) / 2**20
        print(f"{name:12} {what:18} {took:7.3f} ms   host {host_microseconds(run):6.0f} us   {room:6.0f} MiB")


def main() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("benchmark_kernels: needs a Hopper GPU (compute capability 9.0)")
    print(torch.cuda.get_device_name(), torch.__version__)
    with exact_arithmetic(torch.device("cuda")):
        asked = sys.argv[1:] or ["blocks", "formed", "tied"]
        for block in BLOCKS if "blocks" in asked else ():
            measure(*block)
        for layer in LAYERS if "formed" in asked else ():
            measure_formed(*layer)
        for tie in TIES if "tied" in asked else ():
            measure_tied(*tie)


if __name__ == "__main__":
    main()
