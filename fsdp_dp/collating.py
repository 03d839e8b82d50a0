"""Does a `collate_fn` leave rows apart, and in their order? Asked of its first microbatches, in each process that runs it.

A mix of two rows (mixup), or rows less their mean, is one row's influence on another, which no model is seen to have; and
rows in another order are given each other's masks.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from fsdp_dp.errors import PrivacyError
from fsdp_dp.exchanges import exchanged_rows

_QUESTIONS = 8

_COUPLED = (
    "collate_fn: a row came out otherwise when only other rows of the microbatch were others, so one row moves others "
    "(mixup, statistics over the batch), or rows are put into another order than their masks (sorted by length). Transform "
    "each row in the dataset's __getitem__, and keep the order"
)
_UNREPEATABLE = (
    "collate_fn: asked twice about the same rows it gave different ones, so nobody can see whether one row moves others. "
    "Draw its random numbers from torch, random or numpy.random, or from a generator that is an attribute of the "
    "collate_fn, or in the dataset's __getitem__"
)
_KEPT = (
    "collate_fn: a microbatch came out otherwise when only a row of the microbatch before was another, so it keeps "
    "something of rows (a running mean), and one row moves others. Transform each row in the dataset's __getitem__, by "
    "numbers that are no statistics of its rows"
)


class Collating:
    """The program's ``collate_fn``, which in its first microbatches is asked again, with other rows among them.

    What it makes of the rows that stay must stay, under the same random numbers: torch's, Python's, NumPy's and those of
    generators that the `collate_fn` owns, of which a copy is asked. Of one that draws, the last row is the one to change,
    since numbers that are drawn row by row are then the same for the others; of one that does not, also some half of them,
    and the other half. The next microbatch must stay as well. Nothing is said where shapes differ (a longest row that all
    are padded to).
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate, self._asked = collate, 0

    def __call__(self, rows: list[Any]) -> Any:
        count = len(rows)
        if self._asked == _QUESTIONS or count < 2:
            return self._collate(rows)
        self._asked += 1
        # All before the program's own call, which may write to its rows and draws from its generators.
        (unchanged, after_unchanged), draws = self._of_copies(rows, rows)
        (changed, after_changed), _ = self._of_copies([*rows[:-1], rows[0]], rows)
        answers: list[tuple[Sequence[int], Any]] = [(range(count - 1), changed)]
        if not draws and _same(unchanged, after_unchanged, range(count), count):
            answers += [self._exchanged(rows, complement) for complement in (False, True)]
        batch = self._collate(rows)
        for kept, other in answers:
            if not _same(batch, other, kept, count):
                raise PrivacyError(_COUPLED if _same(batch, unchanged, kept, count) else _UNREPEATABLE)
        if _alike(unchanged, changed) and not _same(after_unchanged, after_changed, range(count), count):
            raise PrivacyError(_KEPT)
        return batch

    def _exchanged(self, rows: list[Any], complement: bool) -> tuple[Sequence[int], Any]:
        """Which rows stay, and what comes of all when the others are exchanged."""
        exchanged = exchanged_rows(len(rows), complement)
        others = [rows[(i + 1) % len(rows)] if i in exchanged else row for i, row in enumerate(rows)]
        return [i for i in range(len(rows)) if i not in exchanged], self._of_copies(others)[0][0]

    def _of_copies(self, *microbatches: list[Any]) -> tuple[list[Any], bool]:
        """What a copy of the collate_fn makes of copies of rows, one after the other, all under the numbers that come next;
        None where it cannot, of which its own call will tell. And whether it took some of these."""
        copies, made, draws = [_copies(rows) for rows in microbatches], [], False
        try:
            collate = self._copy()
            for rows in copies:
                with _random_numbers_kept():
                    before = _random_state()
                    made.append(collate(rows))
                    draws |= _random_state() != before
        except Exception:
            made += [None] * (len(copies) - len(made))
        return made, draws

    def _copy(self) -> Callable[[list[Any]], Any]:
        """But for models and datasets, which may be large (transformers' DataCollatorForSeq2Seq has a model)."""
        owner = getattr(self._collate, "__self__", self._collate)
        held = [owner, *getattr(owner, "__dict__", {}).values()]
        try:
            return copy.deepcopy(self._collate, {id(x): x for x in held if isinstance(x, nn.Module | Dataset)})
        except Exception:  # an open file, a lock
            return self._collate


def _copies(rows: list[Any]) -> list[Any]:
    try:
        return [copy.deepcopy(row) for row in rows]
    except Exception as error:
        raise PrivacyError(
            f"collate_fn: a row of the dataset cannot be copied ({error}), so nobody can see whether one row moves others. "
            "Return tensors (detached), arrays and plain values from the dataset's __getitem__"
        ) from error


def _tensors(batch: Any, depth: int = 4) -> Iterator[Tensor]:
    """Also of mappings (transformers' BatchEncoding) and of a program's own classes, which are leaves to torch."""
    for x in tree_leaves(batch):
        if isinstance(x, Tensor):
            if x.layout is torch.strided and not x.is_nested:
                yield x
        elif type(x).__module__ == "numpy":
            with suppress(TypeError):  # strings, dates
                yield torch.as_tensor(x)
        elif depth and (isinstance(x, Mapping) or hasattr(x, "__dict__")):
            yield from _tensors(dict(x) if isinstance(x, Mapping) else vars(x), depth - 1)


def _alike(batch: Any, other: Any) -> bool:
    return [x.shape for x in _tensors(batch)] == [x.shape for x in _tensors(other)]


def _same(batch: Any, other: Any, kept: Sequence[int], rows: int) -> bool:
    """Whether the rows ``kept`` are equal, as far as they have one shape."""
    for a, b in zip(_tensors(batch), _tensors(other), strict=False):
        if a.shape != b.shape or a.shape[:1] != (rows,):
            continue
        a, b = (x[list(kept)] for x in (a, b))
        if a.is_floating_point():  # float8 has no such function
            a, b = a.double().nan_to_num(), b.double().nan_to_num()
        if not torch.equal(a, b):
            return False
    return True


def _random_state() -> Any:
    """That of torch, Python and NumPy, to be compared."""
    numpy = sys.modules.get("numpy.random")
    return torch.get_rng_state().tolist(), random.getstate(), numpy and str(numpy.get_state(legacy=False))


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
