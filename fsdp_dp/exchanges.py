"""Rows put into each other's places: some of them, so chosen that a coupling of any kind shows on those that stay."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@functools.cache
def exchanged_rows(rows: int, complement: bool = False, variant: int = 0) -> tuple[int, ...]:
    """Which rows are exchanged: about half, not the first, so chosen that shifting or reversing the rows gives others.

    (Were it every second row, a layer that is given the rows two places further on would not show.) A second ``variant``
    is another such choice, where there is one.
    """
    found: list[set[int]] = []
    for seed in itertools.count():
        draw = random.Random(seed)
        chosen = {row for row in range(1, rows) if draw.random() < 0.5}
        moved = [{(row + k) % rows for row in chosen} for k in range(1, rows)] + [{rows - 1 - row for row in chosen}]
        if chosen not in found and (rows < 2 or (0 < len(chosen) < rows and chosen not in moved)):
            found.append(chosen)
        if len(found) > variant or (found and seed > 100):
            break
    return tuple(row for row in range(rows) if (row in found[-1]) is not complement)


def exchange_rows(x: Tensor, exchanged: Sequence[int], rows: int) -> Tensor:
    """``x`` ``[B, ...]`` with the ``exchanged`` rows replaced, each by the row after it."""
    if isinstance(x, DTensor):  # split over features or positions: every rank has all rows
        here = exchange_rows(x.to_local(), exchanged, rows)
        return DTensor.from_local(here, x.device_mesh, x.placements, shape=x.shape, stride=x.stride())
    source = torch.arange(rows, device=x.device)
    places = torch.tensor(exchanged, dtype=torch.long, device=x.device)
    source[places] = (places + 1) % rows
    return x.detach().reshape(rows, -1)[source].view(x.shape)


def copy_row(x: Tensor, row: int, places: Sequence[int], rows: int) -> Tensor:
    """``x`` ``[B, ...]`` with ``row`` in these places as well."""
    if isinstance(x, DTensor):
        here = copy_row(x.to_local(), row, places, rows)
        return DTensor.from_local(here, x.device_mesh, x.placements, shape=x.shape, stride=x.stride())
    source = torch.arange(rows, device=x.device)
    source[torch.tensor(places, dtype=torch.long, device=x.device)] = row
    return x.detach().reshape(rows, -1)[source].view(x.shape)


def scale_rows(x: Tensor, scale_B: Tensor) -> Tensor:
    """``x`` ``[B, ...]``, each row by its own factor."""
    if isinstance(x, DTensor):
        here = scale_rows(x.to_local(), scale_B)
        return DTensor.from_local(here, x.device_mesh, x.placements, shape=x.shape, stride=x.stride())
    return x * scale_B.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
