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

import functools
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
_MOST_KEPT, _MOST_DESCRIBED = 4096, 2048
_kept: dict[tuple[Any, ...], Launcher] = {}


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


class Launcher:
    """Launches one kernel for arguments that are all alike: in formats, in what Triton compiles for, and blocks in layout.

    Args:
        blocks: ``(block_shape, layout)`` of the tensors that the kernel takes first and reads block by block; each has one
            shape and one set of strides, whatever launch it is given to.
    """

    def __init__(
        self, kernel: Any, blocks: Sequence[tuple[tuple[int, ...], Any]] = (), *, warps: int, stages: int = 3
    ) -> None:
        self._kernel, self._blocks, self._warps, self._stages = kernel, blocks, warps, stages
        self._compiled: dict[int, _Compiled] = {}
        self._is_known = _IS_TRIED and isinstance(kernel, JITFunction)

    def __call__(self, grid: tuple[int, int, int], tensors: Sequence[Tensor], rest: tuple[Any, ...]) -> None:
        """Launch on the current device and stream.

        Args:
            tensors: those of ``blocks``.
            rest: all else that the kernel takes, in its order, constants included.
        """
        if not self._is_known or knobs.runtime.launch_enter_hook.calls:
            self._launch_by_triton(grid, tensors, rest)
            return
        device = driver.active.get_current_device()
        known = self._compiled.get(device)
        if known is None:
            self._compiled[device] = _Compiled(self._launch_by_triton(grid, tensors, rest), self._blocks)
        else:
            known.launch(grid, driver.active.get_current_stream(device), tensors, rest)

    def _launch_by_triton(self, grid: tuple[int, int, int], tensors: Sequence[Tensor], rest: tuple[Any, ...]) -> Any:
        blocks = [Block(x, *block) for x, block in zip(tensors, self._blocks, strict=True)]
        return _launch_by_triton(self._kernel, grid, (*blocks, *rest), self._warps, self._stages)


Alignments = tuple[bool, ...]
ALL: Alignments = ()
"""Every pointer is a multiple of 16 bytes."""


def aligned_pointers(tensors: Sequence[Tensor]) -> Alignments:
    """Which of them are multiples of 16 bytes, for which Triton compiles; `ALL` if all are."""
    together = 0
    for x in tensors:
        together |= x.data_ptr()
    return ALL if together % 16 == 0 else tuple(x.data_ptr() % 16 == 0 for x in tensors)


class Launchers:
    """A `Launcher` for every pattern of pointers that are aligned."""

    def __init__(
        self, kernel: Any, blocks: Sequence[tuple[tuple[int, ...], Any]] = (), *, warps: int, stages: int = 3
    ) -> None:
        self._make = functools.partial(Launcher, kernel, blocks, warps=warps, stages=stages)
        self._of: dict[Alignments, Launcher] = {}

    def __call__(self, aligned: Alignments) -> Launcher:
        found = self._of.get(aligned)
        if found is None:
            found = self._of[aligned] = self._make()
        return found


def launch(kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], *, warps: int, stages: int = 3) -> None:
    """Launch ``kernel`` on the current device and stream, by a `Launcher` that is looked up.

    Args:
        arguments: all that the kernel takes, in its order, constants included: `Block`s first, then tensors and numbers.
    """
    key = (id(kernel), warps, stages, *map(_key, arguments))
    known = _kept.get(key)
    blocks = [x for x in arguments if type(x) is Block]
    if known is None:
        if len(_kept) >= _MOST_KEPT:  # shapes that change from batch to batch
            _kept.clear()
        known = _kept[key] = Launcher(kernel, [(x.block_shape, x.layout) for x in blocks], warps=warps, stages=stages)
    known(grid, [x.base for x in blocks], arguments[len(blocks) :])


class _Compiled:
    """A kernel that Triton compiled and launched once, and how to launch it again."""

    def __init__(self, compiled: Any, blocks: Sequence[tuple[tuple[int, ...], Any]]) -> None:
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
        self._blocks = blocks
        self._described: list[tuple[int, dict[int, list[Any]]]] = [(number, {}) for number in range(len(blocks))]

    def launch(self, grid: tuple[int, int, int], stream: int, tensors: Sequence[Tensor], rest: tuple[Any, ...]) -> None:
        if self._by_triton:
            compiled = self._compiled
            blocks = (Block(x, *block) for x, block in zip(tensors, self._blocks, strict=True))
            compiled.run(*grid, stream, compiled.function, *self._metadata, *blocks, *rest)
            return
        arguments: list[Any] = []
        for x, (number, known) in zip(tensors, self._described, strict=True):
            address = x.data_ptr()
            found = known.get(address)
            if found is None:
                if len(known) >= _MOST_DESCRIBED:
                    known.clear()
                found = known[address] = self._describe(number, x)
            arguments += found
        self._launch(*grid, stream, *self._fixed, *arguments, *rest)

    def _describe(self, number: int, x: Tensor) -> list[Any]:
        """What the kernel takes for the ``number``-th of its blocks."""
        from triton.backends.nvidia.driver import make_tensordesc_arg

        found: list[Any] = make_tensordesc_arg(Block(x, *self._blocks[number]), self._formats[number])
        return found


def _launch_by_triton(
    kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], warps: int, stages: int
) -> Any:
    described = (x.descriptor() if type(x) is Block else x for x in arguments)
    return kernel[grid](*described, num_warps=warps, num_stages=stages)


def _key(x: Any) -> Any:
    """What Triton may compile a kernel for, and a block's layout; a number's value says more than it asks for."""
    if type(x) is Block:
        return x.base.dtype, x.base.shape, x.base.stride(), x.block_shape
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    return x
