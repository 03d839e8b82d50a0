"""Which rows take part in which release: the draws that the accountant assumes, and the loader that follows them.

In the step: first. Every rank computes the same global draw from a shared key, takes its share, and cuts the share into
the same number of equal-shape microbatches as every other rank. The draws are pure functions of (key, step); the loader
is torch's `DataLoader` with these draws as its batch sampler.

Legend: B rows of a microbatch, W data-parallel ranks.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fsdp_dp.chacha import WORD_LIMIT, WORDS_PER_BLOCK, keystream
from fsdp_dp.collating import Collating
from fsdp_dp.config import PrivacyConfig
from fsdp_dp.draw_guard import DrawGuard
from fsdp_dp.noise import derive_key

# The index that stands for a row of zeros in the lists given to the workers.
PADDING = -1

_UNIFORMS_PER_BLOCK = WORDS_PER_BLOCK // 2
_MAX_DATASET_SIZE = 2**40
_MAX_SKIPS_AT_A_TIME = 2**20

_REFUSED_OPTIONS = {
    "batch_size": "the loader's microbatch_size is the batch size",
    "sampler": "rows are drawn as the accountant assumes",
    "shuffle": "rows are drawn as the accountant assumes",
    "batch_sampler": "rows are drawn as the accountant assumes",
    "drop_last": "every drawn row takes part, and short microbatches are padded with masked rows",
    "in_order": "masks belong to microbatches by their order",
}


def poisson_draw(key: bytes, step: int, dataset_size: int, sample_rate: float) -> torch.Tensor:
    """The rows of one Poisson draw: each row independently with probability `sample_rate`.

    Instead of one coin a row, the gaps between drawn rows are drawn: geometric, `floor(E / -ln(1 - q))` rows skipped
    with E standard exponential, O(q N) work (Devroye 1986, "Non-Uniform Random Variate Generation", chapter X.2).

    Args:
        key: 32 secret bytes, shared by all ranks.
        step: number of the draw, in [0, 2^64).
        dataset_size: N, at most 2^40.
        sample_rate: q in [0, 1].

    Returns:
        int64 [n_drawn], sorted, without duplicates, on CPU; the same on every rank.

    **Formal guarantee.** Draws of different steps use disjoint keystream, so with ChaCha20 a pseudorandom function all
    (step, row) inclusions are independent. Each has probability q up to a relative error of 2^-46 / q: a gap of k rows
    ends at an E whose rounding, a few 2^-53 of it, is k 2^-51 of a row, and gaps end at 45 / q. E has full relative
    precision at *both* ends, so that the spacing of float64 near 1 does not distort a tiny q. q = 1 draws every row.
    """
    _check_draw(step, dataset_size, sample_rate)
    if sample_rate == 1:
        return torch.arange(dataset_size)
    if sample_rate == 0:
        return torch.empty(0, dtype=torch.int64)
    exponentials = _Exponentials(derive_key(key, "poisson draw"), step)
    rate = -math.log1p(-sample_rate)
    position = -1
    drawn = []
    while position < dataset_size:
        expected = (dataset_size - position) * sample_rate
        count = min(int(expected + 4 * math.sqrt(expected)) + 8, _MAX_SKIPS_AT_A_TIME)
        # A gap of dataset_size rows ends the draw wherever it starts, so larger ones need not be represented.
        gaps = exponentials.take(count).div_(rate).clamp_(max=float(dataset_size)).to(torch.int64)
        rows = position + (gaps + 1).cumsum(0)
        drawn.append(rows[rows < dataset_size])
        position = int(rows[-1])
    return torch.cat(drawn)


def shuffled_batches(key: bytes, epoch: int, dataset_size: int, batch_size: int) -> torch.Tensor:
    """The batches of one epoch of shuffling: int64 [dataset_size // batch_size, batch_size]; the remainder is dropped.

    Each row appears at most once. Epochs are independent of each other.
    """
    _check_draw(epoch, dataset_size, 1.0)
    if not 1 <= batch_size <= dataset_size:
        raise ValueError(f"batch_size: found {batch_size}, expected 1 to dataset_size={dataset_size}")
    batches = dataset_size // batch_size
    return _order(derive_key(key, "shuffle"), epoch, dataset_size)[: batches * batch_size].view(batches, batch_size)


def cut_draw(drawn: torch.Tensor, key: bytes, step: int, max_batch_size: int) -> torch.Tensor:
    """`drawn`, or where it has more than `max_batch_size` rows, that many of them chosen uniformly; sorted.

    The choice is independent of the draw and of the data, as the accountant of cut draws assumes.
    """
    if len(drawn) <= max_batch_size:
        return drawn
    return drawn[_order(derive_key(key, "cut"), step, len(drawn))[:max_batch_size]].sort().values


def _order(key: bytes, number: int, count: int) -> torch.Tensor:
    """A uniform permutation of `count`, up to the chance (below `count^2 / 2^65`) that two 64-bit numbers are equal."""
    blocks = -(-count // _UNIFORMS_PER_BLOCK)
    words = keystream(key, _nonce(number), 0, blocks).to(torch.int64).view(-1, 2)
    return (words[:, 0] * WORD_LIMIT + (words[:, 1] & (WORD_LIMIT - 1)))[:count].argsort(stable=True)


def microbatches_needed(rows: int, microbatch_size: int, world_size: int) -> int:
    """Microbatches of every rank for a draw of so many rows: what its largest share takes, and at least one."""
    largest_share = -(-rows // world_size)
    return max(1, -(-largest_share // microbatch_size))


def microbatch_rows(
    drawn: torch.Tensor, microbatch_size: int, rank: int, world_size: int, at_least: int = 1
) -> list[list[int]]:
    """One rank's share of a global draw in equal-shape microbatches: lists of `microbatch_size` rows, real ones first.

    Rank r takes `drawn[r::W]`. The number of microbatches follows from the largest share, so it is the same on all
    ranks, and at least `at_least`: an empty draw gives microbatches of `PADDING` only.
    """
    microbatches = max(at_least, microbatches_needed(len(drawn), microbatch_size, world_size))
    rows = drawn[rank::world_size].tolist()
    rows += [PADDING] * (microbatches * microbatch_size - len(rows))
    return [rows[start : start + microbatch_size] for start in range(0, len(rows), microbatch_size)]


class LogicalBatchLoader:
    """Logical batches as the accountant assumes; each is an iterator over equal-shape collated microbatches.

    One `DataLoader` serves the whole stream, so workers prefetch across logical batches. Each `iter(loader)` gives
    `steps` logical batches and goes on where the last iteration was left: a draw is handed out at most once, and which
    one is next depends on how many were, the same on every rank, not on what workers have prefetched. Only the newest
    iteration of a loader can be advanced.

    Args:
        dataset: map-style, `len(dataset) == privacy.dataset_size`. A row is a tensor, array, number or string, or a
            tree of them.
        privacy: says how rows are drawn (`sampling`, `expected_batch_size`, `dataset_size`).
        key: 32 secret bytes shared by all ranks, for this loader alone: two loaders of one key draw the same rows.
        microbatch_size: B, rows of a microbatch on one rank, padding included.
        steps: logical batches of one iteration; None is endless.
        rank, world_size: *data-parallel* rank and size (tensor-parallel peers share their data).
        on_logical_batch: called before a logical batch is handed out; may raise to refuse.
        on_microbatch: called with the mask (bool [B], True for real rows) just before its microbatch is handed out.
        on_logical_batch_end: called just before the last microbatch of a logical batch is handed out, ahead of its mask.
            What is left of one when the next is asked for is dropped, and none of these is called for it.
        dataloader_kwargs: options of torch's `DataLoader`, save those that choose rows or their order.

    Raises:
        TypeError: the dataset is not map-style.
        ValueError: the dataset's length differs from `privacy.dataset_size`, an option would override the draws, or
            `sampling="external_poisson"`.

    **Formal guarantee.** Each row of a logical batch's draw appears exactly once, on exactly one rank. Padding rows are
    zeros in the structure and shapes of row 0, and are masked. So the accountant may assume `privacy.sampling`, as long
    as every logical batch handed out is released or dropped without regard to its data, and a `collate_fn` leaves rows apart
    (`Collating` asks).
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        privacy: PrivacyConfig,
        key: bytes,
        microbatch_size: int,
        steps: int | None,
        rank: int,
        world_size: int,
        on_logical_batch: Callable[[], None],
        on_microbatch: Callable[[torch.Tensor], None],
        on_logical_batch_end: Callable[[], None],
        dataloader_kwargs: dict[str, Any],
    ) -> None:
        _check_sampling(privacy)
        _check_dataset(dataset, privacy.dataset_size)
        _check_options(dataloader_kwargs)
        _check_counts(microbatch_size, steps, rank, world_size)
        self.microbatch_size = microbatch_size
        self.steps = steps
        self._callbacks = _Callbacks(on_logical_batch, on_microbatch, on_logical_batch_end)
        cap = privacy.max_batch_size
        fixed = 1 if cap is None else microbatches_needed(cap, microbatch_size, world_size)
        draw, guard = _global_draw(key, privacy), DrawGuard(privacy)
        self._schedule = _Schedule(
            lambda number: guard.look(number, draw(number)), microbatch_size, rank, world_size, fixed
        )
        self._newest: _Stream | None = None
        if (collate := dataloader_kwargs.get("collate_fn")) is not None:
            dataloader_kwargs = dataloader_kwargs | {"collate_fn": Collating(collate)}
        self._dataloader = DataLoader(_PaddedRows(dataset), batch_sampler=self._schedule, **dataloader_kwargs)

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError("this loader is endless (steps=None) and has no length; give loader(..., steps=...)")
        return self.steps

    def __iter__(self) -> Iterator[_LogicalBatch]:
        if self._newest is not None:
            self._newest.close("since a newer one of the same loader was started")
        self._schedule.open(self.steps)
        self._newest = _Stream(iter(self._dataloader), self._schedule.pending, self.microbatch_size)
        return _LogicalBatches(self._newest, self._schedule, self.steps, self._callbacks)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a LogicalBatchLoader cannot be copied or pickled: a copy would repeat draws, and its key is secret"
        )


class _Callbacks(NamedTuple):
    on_logical_batch: Callable[[], None]
    on_microbatch: Callable[[torch.Tensor], None]
    on_logical_batch_end: Callable[[], None]


class _Planned(NamedTuple):
    """What the main process knows of a microbatch that the workers may still be loading."""

    real_rows: int
    is_last: bool


class _Schedule:
    """The batch sampler: rows of microbatch after microbatch, with a note of each for the consumer.

    `DataLoader` runs it in the main process, ahead of the workers, and hands microbatches out in the same order; so the
    notes in `pending` and the microbatches pair up one to one.
    """

    def __init__(
        self, draw: Callable[[int], torch.Tensor], microbatch_size: int, rank: int, world_size: int, at_least: int
    ) -> None:
        self._draw = draw
        self._split = (microbatch_size, rank, world_size, at_least)
        self._steps: int | None = None
        self.handed_out = 0
        self.pending: deque[_Planned] = deque()

    def open(self, steps: int | None) -> None:
        """Prepare the next iteration; an older one keeps its own notes."""
        self._steps = steps
        self.pending = deque()

    def __iter__(self) -> Iterator[list[int]]:
        first = self.handed_out
        numbers = itertools.count(first) if self._steps is None else range(first, first + self._steps)
        return self._microbatches(numbers, self.pending)

    def _microbatches(self, draws: Iterable[int], pending: deque[_Planned]) -> Iterator[list[int]]:
        for draw in draws:
            microbatches = microbatch_rows(self._draw(draw), *self._split)
            for number, rows in enumerate(microbatches, start=1):
                pending.append(_Planned(len(rows) - rows.count(PADDING), number == len(microbatches)))
                yield rows


class _Stream:
    """Collated microbatches of one iteration, each with its mask; ends for good at the first error."""

    def __init__(self, batches: Iterator[Any], pending: deque[_Planned], microbatch_size: int) -> None:
        self._batches = batches
        self._pending = pending
        self._positions_B = torch.arange(microbatch_size)
        self._closed: str | None = None

    def next(self) -> tuple[Any, torch.Tensor, bool]:
        """The next microbatch, its mask (bool [B], True for real rows), and whether its logical batch ends with it."""
        if self._closed is not None:
            raise RuntimeError(
                f"LogicalBatchLoader: this iteration is over, {self._closed}; iter(loader) starts another"
            )
        try:
            batch = next(self._batches)
        except BaseException as error:
            # Masks and microbatches may no longer pair up, so nothing more is handed out.
            self.close("since loading a microbatch failed")
            if isinstance(error, StopIteration):
                raise RuntimeError("dataset: loading a row raised StopIteration; raise another error") from error
            raise
        planned = self._pending.popleft()
        return batch, self._positions_B < planned.real_rows, planned.is_last

    def close(self, reason: str) -> None:
        """Hand out no more, and let go of the DataLoader's iterator, so that its workers can stop."""
        self._closed = self._closed or reason
        self._batches = iter(())

    def finish(self) -> None:
        """Let the DataLoader see its own end, at which it stops its workers."""
        if self._closed is None:
            next(self._batches, None)
            self.close("since all its logical batches were handed out")


class _LogicalBatches:
    """One iteration of the loader."""

    def __init__(self, stream: _Stream, schedule: _Schedule, steps: int | None, callbacks: _Callbacks) -> None:
        self._stream = stream
        self._schedule = schedule
        self._left = steps
        self._callbacks = callbacks
        self._current: _LogicalBatch | None = None

    def __iter__(self) -> _LogicalBatches:
        return self

    def __next__(self) -> _LogicalBatch:
        if self._current is not None:
            self._current.drain()
        if self._left == 0:
            self._stream.finish()
            raise StopIteration
        self._callbacks.on_logical_batch()
        self._left = None if self._left is None else self._left - 1
        self._schedule.handed_out += 1
        self._current = _LogicalBatch(self._stream, self._callbacks)
        return self._current


class _LogicalBatch:
    """The microbatches of one logical batch, once."""

    def __init__(self, stream: _Stream, callbacks: _Callbacks) -> None:
        self._stream = stream
        self._callbacks = callbacks
        self._exhausted = False
        self._ended = False

    def __iter__(self) -> _LogicalBatch:
        return self

    def __next__(self) -> Any:
        if self._exhausted:
            raise StopIteration
        batch, mask_B, self._exhausted = self._stream.next()
        if self._exhausted:
            self._end()
        self._callbacks.on_microbatch(mask_B)
        return batch

    def drain(self) -> None:
        """Drop what was not taken, without a word to the engine: those rows take part in no release."""
        self._ended = True
        while not self._exhausted:
            _, _, self._exhausted = self._stream.next()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._callbacks.on_logical_batch_end()


class _PaddedRows(Dataset[Any]):
    """The user's dataset with a row of zeros at `PADDING`; what `torch.utils.data.get_worker_info().dataset` shows."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._zero_row: Any = None
        self._has_zero_row = False

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        real = [index for index in indices if index != PADDING]
        padding = [self.zero_row() for _ in range(len(indices) - len(real))]
        return [*self._load(real), *padding]

    def _load(self, rows: list[int]) -> list[Any]:
        """Rows of the user's dataset, in one call where it offers that (as `DataLoader` does)."""
        try:
            if rows and callable(getattr(self.dataset, "__getitems__", None)):
                return list(self.dataset.__getitems__(rows))
            return [self._load_one(row) for row in rows]
        except Exception as error:
            error.add_note(f"while {type(self.dataset).__name__} read a microbatch of {len(rows)} of its rows")
            raise

    def _load_one(self, row: int) -> Any:
        try:
            return self.dataset[row]
        except Exception as error:
            error.add_note(f"this was row {row}")
            raise

    def zero_row(self) -> Any:
        """A fresh row of zeros, in the structure, shapes and dtypes of row 0."""
        if not self._has_zero_row:
            self._zero_row = zeroed(self._load([0])[0])
            self._has_zero_row = True
        return zeroed(self._zero_row)


def zeroed(row: Any) -> Any:
    """`row` with every tensor, array and number zero (False) and every string empty; structure, shapes, dtypes kept.

    Raises:
        TypeError: a leaf is of another type, so that its zero is unknown.
    """
    return tree_map(_zero_leaf, row)


def _zero_leaf(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return torch.zeros_like(leaf)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(leaf, numpy.ndarray):
        return numpy.zeros_like(leaf)
    if leaf is None or type(leaf) in (bool, int, float, complex, str, bytes):
        return None if leaf is None else type(leaf)()
    if numpy is not None and isinstance(leaf, numpy.generic):
        return type(leaf)()
    raise TypeError(
        f"dataset: a row holds a {type(leaf).__module__}.{type(leaf).__qualname__}, whose zero (for padding rows) is "
        "unknown; expected tensors, numpy arrays, numbers, strings, None, and tuples, lists and dicts of them. Convert "
        "it in the dataset's __getitem__"
    )


class _Exponentials:
    """Independent standard exponentials from the keystream of (key, step), in order."""

    def __init__(self, key: bytes, step: int) -> None:
        self._key = key
        self._nonce = _nonce(step)
        self._next_block = 0

    def take(self, count: int) -> torch.Tensor:
        """The next `count`, float64 [count]; what is left of the last block is dropped."""
        blocks = -(-count // _UNIFORMS_PER_BLOCK)
        words = keystream(self._key, self._nonce, self._next_block, blocks).to(torch.int64).view(-1, 2)
        self._next_block += blocks
        return _exponential(words[:count, 0] & (WORD_LIMIT - 1), words[:count, 1] & (WORD_LIMIT - 1))


def _exponential(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """-ln U with U = 1 - x / 2^64 in (0, 1] of the 64-bit integer x = 2^32 high + low (int64 in [0, 2^32) each).

    Below x = 2^63 it is -log1p(-x / 2^64), above it -ln of 2^64 - x, a sum of exact terms rounded once: full relative
    precision for tiny results and for the largest, 64 ln 2 = 44.4.
    """
    x = (high.double() * 2.0**32 + low.double()) * 2.0**-64
    complement = ((2**32 - 1 - high).double() * 2.0**32 + (2**32 - low).double()) * 2.0**-64
    return -torch.where(high < 2**31, torch.log1p(-x), torch.log(complement))


def _global_draw(key: bytes, privacy: PrivacyConfig) -> Callable[[int], torch.Tensor]:
    """The global draw of `privacy.sampling` as a function of the number of the logical batch."""
    if privacy.sampling == "poisson":
        cap = privacy.dataset_size if privacy.max_batch_size is None else privacy.max_batch_size
        return lambda number: cut_draw(
            poisson_draw(key, number, privacy.dataset_size, privacy.sample_rate), key, number, cap
        )
    batches_of = functools.lru_cache(maxsize=1)(
        lambda epoch: shuffled_batches(key, epoch, privacy.dataset_size, privacy.expected_batch_size)
    )
    per_epoch = privacy.dataset_size // privacy.expected_batch_size
    return lambda number: batches_of(number // per_epoch)[number % per_epoch]


def _nonce(number: int) -> tuple[int, int, int]:
    return (0, number % WORD_LIMIT, number // WORD_LIMIT)


def _check_draw(number: int, dataset_size: int, sample_rate: float) -> None:
    if number < 0:
        raise ValueError(f"step or epoch: found {number}, expected at least 0")
    if not 1 <= dataset_size <= _MAX_DATASET_SIZE:
        raise ValueError(f"dataset_size: found {dataset_size}, expected 1 to 2^40")
    if not 0 <= sample_rate <= 1:
        raise ValueError(f"sample_rate: found {sample_rate}, expected 0 to 1")


def _check_sampling(privacy: PrivacyConfig) -> None:
    if privacy.sampling not in ("poisson", "shuffle"):
        raise ValueError(
            f"sampling: found '{privacy.sampling}', under which you bring your own loader; run its microbatches within "
            "`with engine.microbatch(mask)`, or set sampling='poisson' to use this loader"
        )


def _check_dataset(dataset: Any, dataset_size: int) -> None:
    missing = [name for name in ("__getitem__", "__len__") if not hasattr(dataset, name)]
    if isinstance(dataset, IterableDataset) or missing:
        if isinstance(dataset, DataLoader):
            raise TypeError(
                "dataset: found a DataLoader; pass its dataset: which rows make up a batch is drawn here, since epsilon "
                "depends on it. Its collate_fn, num_workers and the like are options of engine.loader"
            )
        reason = "it is an IterableDataset" if isinstance(dataset, IterableDataset) else f"it has no {missing[0]}"
        raise TypeError(
            f"dataset: found {type(dataset).__name__}, but {reason}; expected a map-style dataset, whose rows can be "
            "read in any order. Load the stream into one (a list of rows will do)"
        )
    if len(dataset) != dataset_size:
        raise ValueError(
            f"dataset: found {len(dataset)} rows, expected privacy.dataset_size={dataset_size}, on which epsilon "
            "rests; correct PrivacyConfig.dataset_size or the dataset"
        )


def _check_options(dataloader_kwargs: dict[str, Any]) -> None:
    for option, reason in _REFUSED_OPTIONS.items():
        if option in dataloader_kwargs:
            raise ValueError(
                f"{option}: found {option}={dataloader_kwargs[option]!r}, but this loader chooses rows and their order "
                f"itself ({reason}); leave {option} out"
            )


def _check_counts(microbatch_size: int, steps: int | None, rank: int, world_size: int) -> None:
    if microbatch_size < 1:
        raise ValueError(f"microbatch_size: found {microbatch_size}, expected at least 1")
    if steps is not None and steps < 0:
        raise ValueError(f"steps: found {steps}, expected at least 0, or None for an endless loader")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: found {rank}, expected 0 to world_size - 1 = {world_size - 1} (data-parallel)")
