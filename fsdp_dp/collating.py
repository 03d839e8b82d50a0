"""Does a `collate_fn` leave rows apart, and in their order? Asked of its first microbatches, in each process that runs it.

A mix of two rows (mixup), or rows less their mean, is one row's influence on another, which no model is seen to have; and
rows in another order are given each other's masks.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fsdp_dp.errors import PrivacyError

_QUESTIONS = 8

_COUPLED = (
    "collate_fn: a row came out otherwise when only the last row of the microbatch was another, so one row moves others "
    "(mixup, statistics over the batch), or rows are put into another order than their masks (sorted by length). Transform "
    "each row in the dataset's __getitem__, and keep the order"
)
_UNREPEATABLE = (
    "collate_fn: asked twice about the same rows it gave different ones, so nobody can see whether one row moves others. "
    "Draw its random numbers from torch, random or numpy.random, or from a generator that is an attribute of the "
    "collate_fn, or in the dataset's __getitem__"
)


class Collating:
    """The program's ``collate_fn``, which in its first microbatches is asked once more, with another last row.

    What it makes of the rows before must stay, under the same random numbers: torch's, Python's, NumPy's and those of
    generators that the `collate_fn` owns, of which a copy is asked. The last row is the one to change, since numbers that
    are drawn row by row are then the same for the others. Nothing is said where shapes differ (a longest row that all are
    padded to).
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate, self._asked = collate, 0

    def __call__(self, rows: list[Any]) -> Any:
        if self._asked == _QUESTIONS or len(rows) < 2:
            return self._collate(rows)
        self._asked += 1
        # Both before the program's own call, which may write to its rows and draws from its generators.
        unchanged, changed = self._of_copies(rows), self._of_copies([*rows[:-1], rows[0]])
        batch = self._collate(rows)
        if not _same(batch, changed, len(rows)):
            raise PrivacyError(_COUPLED if _same(batch, unchanged, len(rows)) else _UNREPEATABLE)
        return batch

    def _of_copies(self, rows: list[Any]) -> Any:
        """What a copy of the collate_fn makes of copies of rows; None where it cannot, of which its own call will tell."""
        copies = [copy.deepcopy(row) for row in rows]
        with _random_numbers_kept():
            try:
                return self._copy()(copies)
            except Exception:
                return None

    def _copy(self) -> Callable[[list[Any]], Any]:
        try:
            return copy.deepcopy(self._collate)
        except Exception:  # an open file, a lock
            return self._collate


def _same(batch: Any, other: Any, rows: int) -> bool:
    """Whether all rows but the last are equal, as far as they have one shape."""
    for x, y in zip(tree_leaves(batch), tree_leaves(other), strict=False):
        a, b = (torch.as_tensor(v) if type(v).__module__ == "numpy" else v for v in (x, y))
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape or a.shape[:1] != (rows,):
            continue
        if not torch.equal(a[:-1].nan_to_num(), b[:-1].nan_to_num()):
            return False
    return True


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Those of torch, Python and NumPy are drawn again afterwards."""
    numpy = sys.modules.get("numpy.random")
    kept = torch.get_rng_state(), random.getstate(), numpy and numpy.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        random.setstate(kept[1])
        if numpy is not None:
            numpy.set_state(kept[2])
