"""Bytes that a program holds, followed operation by operation, and what it sends. On fake tensors: would hold.

Every storage that an operation returns is counted until it is freed. Peaks are kept by *segment*: the part of a step that
runs at that moment ("forward of block 1", "optimizer"), since only peaks at one place of the program can be compared
between two depths of a model (see `depth`).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Segment: TypeAlias = tuple[str, int]
"""A phase of the step, and the place in it: a block's number, counted from the end where negative."""

PARAMETERS, STATE, SUMS, GRADIENTS = "parameters", "optimizer state", "clipped sums", "gradients"
UNITS, ACTIVATIONS, RECORDS, SCRATCH = "gathered units and buckets", "activations", "rows' records", "scratch"
KINDS = (PARAMETERS, STATE, SUMS, GRADIENTS, UNITS, ACTIVATIONS, RECORDS, SCRATCH)
"""What memory is held for; scratch is whatever else backward and the optimizer make."""

_COLLECTIVES = {
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "allreduce": "all-reduce",
    "broadcast": "broadcast",
}


class MemoryTracker(TorchDispatchMode):
    """Follows what is made while it is active.

    Attributes:
        peaks: of each segment, bytes by kind when their sum was largest.
        calls: collectives by kind.
        sent: bytes of the unsharded tensor of each of them, by kind: all-gather's output, reduce-scatter's input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[Segment, Counter[str]] = {}
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._segment: Segment = ("start", 0)
        self._kind = PARAMETERS
        self._held: Counter[str] = Counter()
        self._storages: dict[int, tuple[str, int, Any]] = {}

    def __enter__(self) -> MemoryTracker:
        self._torch_resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._resizing()  # type: ignore[method-assign]
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._torch_resize  # type: ignore[method-assign]
        super().__exit__(*exception)

    def move(self, phase: str, place: int = 0, kind: str | None = None) -> None:
        """The program goes on to another segment, where new storages are held for ``kind``."""
        self._segment, self._kind = (phase, place), kind or self._kind
        self._note_peak()

    def forget(self) -> None:
        """Start anew: peaks and collectives so far are dropped, what is held stays."""
        self.peaks.clear()
        self.calls.clear()
        self.sent.clear()

    def count(self, tensors: Iterable[Tensor], kind: str, *, instead_of: tuple[str, ...] = KINDS) -> None:
        """From here on these tensors are held for ``kind``, if they were held for one of ``instead_of`` or not known."""
        for tensor in tensors:
            self._see(tensor, kind)
            key = _storage(tensor)._cdata
            before, size, alive = self._storages[key]
            if before in instead_of:
                self._storages[key] = (kind, size, alive)
                self._held[before] -= size
                self._held[kind] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._see(tensor, self._kind)
        if func.namespace in ("fsdp", "c10d", "_c10d_functional"):
            tensors = list(_tensors((args, kwargs, out)))
            self.count(tensors, UNITS, instead_of=(ACTIVATIONS, SCRATCH))
            self._count_collective(func, tensors)
        self._note_peak(_workspace(func, args))
        return out

    def _see(self, tensor: Tensor, kind: str) -> None:
        storage = _storage(tensor)
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = (kind, storage.nbytes(), weakref.ref(storage, lambda _: self._free(key)))
            self._held[kind] += storage.nbytes()

    def _free(self, key: int) -> None:
        kind, size, _ = self._storages.pop(key)
        self._held[kind] -= size

    def _resizing(self) -> Callable[..., Any]:
        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = self._torch_resize(storage, size)
            if storage._cdata in self._storages:
                kind, before, alive = self._storages[storage._cdata]
                self._storages[storage._cdata] = (kind, size, alive)
                self._held[kind] += size - before
                self._note_peak()
            return result

        return resize_

    def _note_peak(self, extra: int = 0) -> None:
        known = self.peaks.get(self._segment)
        if known is None or self._held.total() + extra > known.total():
            self.peaks[self._segment] = +(self._held + Counter({SCRATCH: extra}))

    def _count_collective(self, func: Any, tensors: Iterable[Tensor]) -> None:
        plain = func._opname.replace("_", "")
        kind = next((name for part, name in _COLLECTIVES.items() if part in plain), None)
        if kind is not None and func.namespace != "fsdp":
            self.calls[kind] += 1
            self.sent[kind] += max(local(x).nbytes for x in tensors)


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor))


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return local(tensor).untyped_storage()


def _workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that a kernel holds while it runs, besides what it returns, where they are many."""
    if func in (torch.ops.aten._log_softmax.default, torch.ops.aten._log_softmax_backward_data.default):
        return sum(
            x.nbytes for x in args if isinstance(x, Tensor) and not x.is_contiguous()
        )  # it makes them contiguous
    return 0
