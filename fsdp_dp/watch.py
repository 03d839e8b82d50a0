"""What only running the model shows: parameters used behind their layer's back, and buffers written from data (rule 9).

Both are looked for in the first training forward, and refused there: a parameter that is used outside its own layer
would lose that part of its gradient, and a buffer that a forward changes carries un-noised data into checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fsdp_dp.attention import Projection
from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.marks import mark, mark_rows, marks_of
from fsdp_dp.shared_values import METADATA, SharedValue, function_name
from fsdp_dp.taps import raw_attribute

Site = tuple[nn.Module, str]


class FirstForward(TorchFunctionMode):
    """Active during the first training forward of the root; `verify` is called at its end.

    It also marks what descends from ``inputs``, the rows' data (see `shared_values`).

    Args:
        sites: (module, attribute) -> canonical name, for every managed parameter.
        running: the stack of layers whose forward is running now.
    """

    def __init__(
        self, root: nn.Module, sites: Mapping[Site, str], running: Sequence[nn.Module], inputs: Any = ()
    ) -> None:
        super().__init__()
        for tensor in _tensors((inputs,), {}):
            mark_rows(tensor)
        self._root, self._sites, self._running = root, sites, running
        self._shapes: set[tuple[int, ...]] | None = None
        self._buffers: dict[str, Tensor] = {}
        self.settled = True

    def __enter__(self) -> FirstForward:
        self._buffers = {name: buffer.detach().clone() for name, buffer in self._root.named_buffers()}
        return super().__enter__()  # type: ignore[return-value]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function_name(func) in METADATA:
            return func(*args, **kwargs)
        tensors = list(_tensors(args, kwargs))
        for tensor in tensors:
            if not isinstance(tensor, SharedValue):
                self._check_use(tensor, func)
        result = func(*args, **kwargs)
        marks = marks_of(function_name(func), args, kwargs, tensors)
        for tensor in _tensors((result,), {}) if marks else ():
            mark(tensor, marks)
        return result

    def _check_use(self, tensor: Tensor, func: Callable[..., Any]) -> None:
        owners = [(module, name) for (module, attribute), name in self._sites.items() if _is(module, attribute, tensor)]
        running = self._running[-1] if self._running else None
        running = running.owner if isinstance(running, Projection) else running
        if not owners or any(module is running for module, _ in owners):
            return
        if _called_from_torch_distributed():
            return
        raise UnsupportedModelError(
            f"Parameter '{owners[0][1]}' is used by {function_name(func)} outside its own layer's forward, so that part of "
            "its gradient would escape clipping. Call the layer itself, or wrap this use in a supported layer"
        )

    def verify(self) -> None:
        """Raises UnsupportedModelError if the forward changed a buffer."""
        for name, buffer in self._root.named_buffers():
            before = self._buffers.get(name)
            if before is None or before.shape != buffer.shape:
                self.settled = False  # made, or resized, just now: a cache will stay as it is, a statistic will not
                continue
            if not torch.equal(torch.nan_to_num(before.to(buffer.device, buffer.dtype)), torch.nan_to_num(buffer)):
                raise UnsupportedModelError(
                    f"Buffer '{name}' was changed by a training forward. It would carry un-noised statistics of the "
                    "data into checkpoints (running statistics, codebooks, load-balance counters): use a layer without "
                    "it, or put that module into eval mode"
                )


class Uncompiled:
    """While on, what `torch.compile` has compiled runs as it was written: nobody sees what happens inside a graph.

    From a watched forward to the end of its backward, so that activation checkpointing runs again what it ran before.
    """

    def __init__(self) -> None:
        self._stance: AbstractContextManager[None] | None = None

    def start(self) -> None:
        if self._stance is None:
            self._stance = torch.compiler.set_stance("force_eager")

    def stop(self) -> None:
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
        self._stance = None


def buffer_versions(root: nn.Module) -> dict[str, tuple[int, int]]:
    """What changes when a buffer is written or replaced; reads no data."""
    return {name: (id(buffer), buffer._version) for name, buffer in root.named_buffers()}


def _is(module: nn.Module, attribute: str, tensor: Tensor) -> bool:
    return raw_attribute(module, attribute) is tensor


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    yield from (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))


def _called_from_torch_distributed() -> bool:
    """FSDP moves parameters around inside the forward; that is no use of them."""
    frame = sys._getframe(1)
    while frame is not None:
        if "/torch/distributed/" in frame.f_code.co_filename.replace("\\", "/"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
