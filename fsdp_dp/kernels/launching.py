"""Launches of kernels that a step asks for hundreds of times, past what Triton does anew for each of them.

Triton finds a compiled kernel by binding and specializing all arguments, compares every global that the kernel reads, and
builds descriptors that check themselves: half of the time that a launch takes the host. A kernel that was launched before
with the same numbers, formats and alignments is the same kernel, so it is kept by these and given to Triton's own launcher.

Private names used, of Triton 3.6: ``CompiledKernel.run``, ``.function`` and ``.packed_metadata``, in the order in which
``JITFunction.run`` passes them. Under another version, in the interpreter and under a profiler's hooks Triton does it all.
"""

# Triton is not annotated.
# mypy: allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_IS_TRIED = triton.__version__.startswith("3.6.")
_MOST_KEPT = 4096
_kept: dict[tuple[Any, ...], Any] = {}


class Block:
    """A tensor that a kernel reads block by block through the copy engine, as `outer` hands it over.

    ``layout`` is Gluon's, of the block in shared memory; None where Triton finds it.
    """

    __slots__ = ("base", "block_shape", "key", "layout", "padding", "shape", "strides")

    def __init__(self, base: Tensor, block_shape: tuple[int, ...], layout: Any = None) -> None:
        self.base, self.block_shape, self.layout, self.padding = base, block_shape, layout, "zero"
        self.shape, self.strides = list(base.shape), list(base.stride())
        self.key = (base.dtype, block_shape)

    def descriptor(self) -> Any:
        """For Triton itself, which checks it."""
        if self.layout is None:
            return TensorDescriptor(self.base, self.shape, self.strides, list(self.block_shape))
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as WithLayout

        return WithLayout(self.base, self.shape, self.strides, list(self.block_shape), self.layout)


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    *,
    warps: int,
    stages: int = 3,
    key: tuple[Any, ...] | None = None,
) -> None:
    """Launch ``kernel`` on the current device and stream.

    Args:
        arguments: all that the kernel takes, in its order, constants included: tensors, numbers and `Block`s.
        key: what decides all of their formats, alignments and numbers, where the caller knows something shorter.
    """
    if not _IS_TRIED or not isinstance(kernel, JITFunction) or knobs.runtime.launch_enter_hook.calls:
        _launch_by_triton(kernel, grid, arguments, warps, stages)
        return
    device = driver.active.get_current_device()
    key = (id(kernel), device, warps, stages, *([_key(x) for x in arguments] if key is None else key))
    compiled = _kept.get(key)
    if compiled is None:
        if len(_kept) >= _MOST_KEPT:  # shapes that change from batch to batch
            _kept.clear()
        _kept[key] = _launch_by_triton(kernel, grid, arguments, warps, stages)
        return
    stream = driver.active.get_current_stream(device)
    nothing = (None, None, None)  # no metadata for hooks, and no hooks
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, *nothing, *arguments)


def _launch_by_triton(
    kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], warps: int, stages: int
) -> Any:
    described = (x.descriptor() if type(x) is Block else x for x in arguments)
    return kernel[grid](*described, num_warps=warps, num_stages=stages)


def _key(x: Any) -> Any:
    """What Triton may compile a kernel for; a number's value says more than it asks for."""
    if type(x) is Block:
        return x.key
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    return x
