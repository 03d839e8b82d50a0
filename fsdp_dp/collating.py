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


class Collating:
    """The program's ``collate_fn``, which in its first microbatches is asked once more, with another last row.

    What it makes of the rows before must stay, under the same random numbers. The last row is the one to change, since
    numbers that are drawn row by row are then the same for the others. Nothing is said where shapes differ (a longest row
    that all are padded to).
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate, self._asked = collate, 0

    def __call__(self, rows: list[Any]) -> Any:
        if self._asked == _QUESTIONS or len(rows) < 2:
            return self._collate(rows)
        self._asked += 1
        others = [copy.deepcopy(row) for row in (*rows[:-1], rows[0])]
        with _random_numbers_kept():
            try:
                again = self._collate(others)
            except Exception:  # of these rows; it will say so of its own
                again = None
        batch = self._collate(rows)
        _compare(batch, again, len(rows))
        return batch


def _compare(batch: Any, again: Any, rows: int) -> None:
    """Raises PrivacyError if one of the rows before the last differs."""
    for x, y in zip(tree_leaves(batch), tree_leaves(again), strict=False):
        a, b = (torch.as_tensor(v) if type(v).__module__ == "numpy" else v for v in (x, y))
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape or a.shape[:1] != (rows,):
            continue
        if not torch.equal(a[:-1].nan_to_num(), b[:-1].nan_to_num()):
            raise PrivacyError(
                "collate_fn: a row came out otherwise when only the last row of the microbatch was another, so one row "
                "moves others (mixup, statistics over the batch), or rows are put into another order than their masks "
                "(sorted by length). Transform each row in the dataset's __getitem__, and keep the order"
            )


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
