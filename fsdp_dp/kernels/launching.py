"""Launches of kernels that a step asks for hundreds of times, past what Triton does anew for each of them.

Triton finds a compiled kernel by binding and specializing all arguments, compares every global that the kernel reads, and
builds descriptors that check themselves: half of the time that a launch takes the host. A kernel that was launched before
with the same numbers, formats and alignments is the same kernel, so it is kept by these and given to Triton's own launcher.

A block's descriptor is made of its address, its shape and its strides alone, and a step's tensors lie where those of the
step before lay: descriptors are kept, too.

Private names used, of Triton 3.6: ``CompiledKernel.run``, ``.function`` and ``.packed_metadata``; of the former, a
``CudaLauncher``, ``launch`` and what that is a closure of, ``global_scratch_size``, ``profile_scratch_size``,
``launch_cooperative_grid`` and ``launch_pdl``; ``make_tensordesc_arg``. Under another version, in the interpreter and under
a profiler's hooks Triton does it all.
"""

# Triton is not annotated.
# mypy: allow-untyped-calls

from __future__ import annotations

import inspect
from collections.abc import Sequence
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
_kept: dict[tuple[Any, ...], _Launch] = {}


class Block:
    """A tensor that a kernel reads block by block through the copy engine, as `outer` hands it over.

    ``layout`` is Gluon's, of the block in shared memory; None where Triton finds it.
    """

    __slots__ = ("base", "block_shape", "layout")
    padding = "zero"

    def __init__(self, base: Tensor, block_shape: tuple[int, ...], layout: Any = None) -> None:
        self.base, self.block_shape, self.layout = base, block_shape, layout

    @property
    def shape(self) -> list[int]:
        return list(self.base.shape)

    @property
    def strides(self) -> list[int]:
        return list(self.base.stride())

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
    known = _kept.get(key)
    if known is None:
        if len(_kept) >= _MOST_KEPT:  # shapes that change from batch to batch
            _kept.clear()
        _kept[key] = _Launch(_launch_by_triton(kernel, grid, arguments, warps, stages))
        return
    known(grid, driver.active.get_current_stream(device), arguments)


class _Launch:
    """Launches one compiled kernel."""

    def __init__(self, compiled: Any) -> None:
        self._compiled, run = compiled, compiled.run
        how = (compiled.function, run.launch_cooperative_grid, run.launch_pdl)
        nothing = (None, None, None)  # no metadata for hooks, and no hooks
        self._metadata = (compiled.packed_metadata, *nothing)
        self._fixed = (*how, None, None, *self._metadata)
        inner = inspect.getclosurevars(run.launch).nonlocals if inspect.isfunction(run.launch) else {}
        self._launch = inner.get("launcher", run.launch)
        self._formats: Sequence[Any] = inner.get("tensordesc_meta", ())
        needs_memory = run.global_scratch_size > 0 or run.profile_scratch_size > 0
        self._by_triton = needs_memory or None in self._formats  # None: without a copy engine, blocks are plain tensors
        self._described: dict[tuple[Any, ...], list[Any]] = {}

    def __call__(self, grid: tuple[int, int, int], stream: int, arguments: tuple[Any, ...]) -> None:
        if self._by_triton:
            compiled = self._compiled
            compiled.run(*grid, stream, compiled.function, *self._metadata, *arguments)
            return
        if self._formats:
            expanded: list[Any] = []
            blocks = 0
            for x in arguments:
                if type(x) is Block:
                    expanded += self._descriptor(blocks, x)
                    blocks += 1
                else:
                    expanded.append(x)
            self._launch(*grid, stream, *self._fixed, *expanded)
        else:
            self._launch(*grid, stream, *self._fixed, *arguments)

    def _descriptor(self, number: int, block: Block) -> list[Any]:
        """What the kernel takes for its ``number``-th block."""
        x = block.base
        where = (number, x.data_ptr(), x.shape, x.stride())
        found = self._described.get(where)
        if found is None:
            if len(self._described) >= _MOST_KEPT:
                self._described.clear()
            from triton.backends.nvidia.driver import make_tensordesc_arg

            found = self._described[where] = make_tensordesc_arg(block, self._formats[number])
        return found


def _launch_by_triton(
    kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], warps: int, stages: int
) -> Any:
    described = (x.descriptor() if type(x) is Block else x for x in arguments)
    return kernel[grid](*described, num_warps=warps, num_stages=stages)


def _key(x: Any) -> Any:
    """What Triton may compile a kernel for; a number's value says more than it asks for."""
    if type(x) is Block:
        return x.base.dtype, x.block_shape
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    return x
