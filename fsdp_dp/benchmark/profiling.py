"""Where the GPU's time of a step goes, from a profiler trace: by kind of work, and what nothing hides.

Every kernel is in one kind. ``exposed communication`` is the time in which only collectives run; ``idle`` the time in
which nothing does. The overhead of a private step is the difference of two such accounts.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

Span = tuple[float, float]

_KINDS = (
    ("communication", ("nccl",)),
    ("noise", ("_privatize",)),
    ("weighted gradients", ("_weighted_outer",)),
    ("norms", ("_sum_tiles", "_finish", "_position_sums", "_weigh", "NormTwoOps", "norm_kernel")),
    ("optimizer", ("multi_tensor_apply", "FusedAdam")),
    ("attention", ("flash", "fmha", "attention")),
    ("matrix products", ("gemm", "cutlass", "nvjet", "cublas", "xmma")),
    ("copies", ("Memcpy", "Memset", "copy", "CatArray", "chunk_cat", "split_with_sizes")),
)


def account(step: Callable[[], None], trace: Path | None = None) -> dict[str, Any]:
    """Milliseconds of one step by kind, its costliest kernels, and how many there were."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json.gz" if trace is None else trace
        found.export_chrome_trace(str(path))
        with gzip.open(path, "rt") as file:
            events = json.load(file)["traceEvents"]
    return account_of_events([e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")])


def account_of_events(kernels: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The account of a list of trace events, times in microseconds as the profiler writes them."""
    if not kernels:
        return {"launches": 0}
    times, names = Counter[str](), Counter[str]()
    for event in kernels:
        times[kind_of(event["name"])] += event["dur"]
        names[event["name"][:90]] += event["dur"]
    spans = [(kind_of(e["name"]) == "communication", (e["ts"], e["ts"] + e["dur"])) for e in kernels]
    everything = covered([span for _, span in spans])
    work = covered([span for is_communication, span in spans if not is_communication])
    whole = max(span[1] for _, span in spans) - min(span[0] for _, span in spans)
    return {
        "launches": len(kernels),
        "ms": {kind: round(us / 1e3, 2) for kind, us in times.most_common()},
        "exposed communication": round((everything - work) / 1e3, 2),
        "idle": round((whole - everything) / 1e3, 2),
        "whole": round(whole / 1e3, 2),
        "kernels": {name: round(us / 1e3, 2) for name, us in names.most_common(25)},
    }


def kind_of(kernel: str) -> str:
    return next((kind for kind, marks in _KINDS if any(mark in kernel for mark in marks)), "elementwise and others")


def covered(spans: Sequence[Span]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
