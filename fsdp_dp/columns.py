"""Stored gradients of vectors, side by side as columns of one tensor: kernel launches, not bytes, are what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

MAX_SCRATCH_ELEMENTS = 1 << 25

SMALL = 1 << 14
"""Stored gradients of up to this many elements a row (biases, norms) are handled together."""


def is_few(x: Tensor) -> bool:
    """Elements a row. (`len` of a tensor takes the host five times as long as its shape.)"""
    return x.numel() <= x.shape[0] * SMALL


def portions(values: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Such as fit the scratch side by side."""
    portions: list[dict[str, Tensor]] = []
    left = 0
    for name, value in values.items():
        if not portions or value.numel() > left:
            portions.append({})
            left = MAX_SCRATCH_ELEMENTS
        portions[-1][name] = value
        left -= value.numel()
    return portions


def side_by_side(values: Sequence[Tensor]) -> Tensor:
    """``[B, ...]`` each, as one ``[B, n]`` whose last stride is 1: a view of those that stand side by side already."""
    runs: list[list[Tensor]] = []
    for x in values:
        x_BN = x if x.ndim == 2 and x.stride(1) == 1 else x.flatten(1)
        if x_BN.stride(1) != 1:  # `flatten` keeps what it can keep: expanded gradients, transposed ones
            x_BN = x_BN.clone(memory_format=torch.contiguous_format)
        if runs and _follows(x_BN, runs[-1]):
            runs[-1].append(x_BN)
        else:
            runs.append([x_BN])
    whole = [run[0] if len(run) == 1 else _spanned(run) for run in runs]
    return whole[0] if len(whole) == 1 else torch.cat(whole, 1)


def _follows(x_BN: Tensor, run: Sequence[Tensor]) -> bool:
    """Whether ``x_BN`` are the columns behind those of the run, of one memory."""
    last = run[-1]
    return (
        x_BN.storage_offset() == last.storage_offset() + last.shape[1]
        and x_BN.stride() == last.stride()
        and x_BN.dtype == last.dtype
        and x_BN.untyped_storage()._cdata == last.untyped_storage()._cdata
    )


def _spanned(run: Sequence[Tensor]) -> Tensor:
    first = run[0]
    return first.as_strided((first.shape[0], sum(x.shape[1] for x in run)), first.stride())
