"""What `torch.compile` does to a case: nothing of the case before it, and nothing in a timed step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

AT_MOST = 10


def forget() -> None:
    """Graphs of the case before, which count towards the compiler's limit of graphs for one function."""
    torch.compiler.reset()
    _counters().clear()


def settle(step: Callable[[], None]) -> dict[str, int]:
    """Step until no rank compiles; how many graphs there are, and how many places where a graph breaks.

    Raises:
        RuntimeError: something is compiled in every step.
    """
    for _ in range(AT_MOST):
        before = _graphs()
        step()
        compiled = torch.tensor(_graphs() - before)
        if dist.get_backend() == "nccl":
            compiled = compiled.cuda()
        dist.all_reduce(compiled)
        if not int(compiled):
            return {"graphs": _graphs(), "breaks": sum(_counters()["graph_break"].values())}
    raise RuntimeError(f"something was compiled in each of {AT_MOST} steps after warm-up")


def _graphs() -> int:
    return int(_counters()["stats"]["unique_graphs"])


def _counters() -> Any:
    import torch._dynamo.utils

    return torch._dynamo.utils.counters
