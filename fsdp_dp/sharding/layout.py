"""Which elements of a parameter this rank holds: a box that one cut after another leaves of it. Pure.

A cut halves (thirds, ...) one dimension of what the cuts before it left, as `torch.chunk` does. Tensor parallelism cuts
first, FSDP cuts what is left: that is what DTensor's ``_StridedShard`` says, read from left to right.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
    """The elements of a global parameter (flattened) that a local shard holds: a run, or a column block of one.

    Without ``columns``: elements ``start .. start + count``. With ``columns = (width, offset, size)``: that run seen
    as rows of ``width``, of which the shard holds columns ``offset .. offset + size``.
    """

    start: int
    count: int
    columns: tuple[int, int, int] | None = None

    @property
    def numel(self) -> int:
        return self.count if self.columns is None else self.count // max(1, self.columns[0]) * self.columns[2]


@dataclasses.dataclass(frozen=True)
class Cut:
    """Of ``parts`` pieces along dimension ``dim``, piece ``index``."""

    dim: int
    parts: int
    index: int


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """(offset, size) of a piece as `torch.chunk` cuts it."""
    width = -(-size // parts)
    start = min(index * width, size)
    return start, min(width, size - start)


def box(shape: Sequence[int], cuts: Iterable[Cut]) -> list[tuple[int, int]]:
    """(offset, size) in every dimension of what the cuts leave."""
    left = [(0, size) for size in shape]
    for cut in cuts:
        offset, size = left[cut.dim]
        within, piece = chunk(size, cut.parts, cut.index)
        left[cut.dim] = (offset + within, piece)
    return left


def region(shape: Sequence[int], cuts: Iterable[Cut]) -> Region:
    """The box as a region of the flattened parameter.

    Raises:
        ValueError: two dimensions other than the first are cut, so that the box is no column block.
    """
    left = box(shape, cuts)
    inner = [dim for dim in range(1, len(shape)) if left[dim] != (0, shape[dim])]
    if len(inner) > 1:
        raise ValueError(f"a parameter of shape {tuple(shape)} split along dimensions {inner} is not supported")
    (first, rows), row = (left[0] if shape else (0, 1)), math.prod(shape[1:])
    if not inner:
        return Region(start=first * row, count=rows * row)
    (dim,), below = inner, math.prod(shape[inner[0] + 1 :])
    offset, size = left[dim]
    return Region(start=first * row, count=rows * row, columns=(shape[dim] * below, offset * below, size * below))
