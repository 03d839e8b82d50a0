"""How many collectives a step issues, and what they carry."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_KINDS = {"allgather": "all-gather", "reducescatter": "reduce-scatter", "allreduce": "all-reduce"}


class Collectives(TorchDispatchMode):
    """Counts what is issued inside: ``counts`` by kind, ``sent`` in bytes of the largest tensor of each."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.sent = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            plain = func._opname.replace("_", "")
            kind = next((name for key, name in _KINDS.items() if key in plain), None)
            if kind is not None and not plain.startswith(("wait", "wrap")):
                self.counts[kind] += 1
                self.sent[kind] += max(x.numel() * x.element_size() for x in _tensors(args))
        return func(*args, **(kwargs or {}))


def _tensors(args: Any) -> list[Tensor]:
    return [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
