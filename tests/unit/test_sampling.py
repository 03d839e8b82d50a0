"""Sampling: the draws are what the accountant assumes, and the loader hands out these rows and no others.

Statistical bounds are for fixed keys. A docstring says "Seen to fail" where the property was broken on purpose and the
test was seen to find it. Legend: T steps, N rows of the dataset.
"""

import copy
import itertools
import math
import pickle
import random
from collections import UserDict, namedtuple
from collections.abc import Callable
from decimal import Decimal, localcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from fsdp_dp import PrivacyError, noise, sampling
from fsdp_dp.collating import Collating
from fsdp_dp.config import PrivacyConfig
from fsdp_dp.sampling import (
    PADDING,
    LogicalBatchLoader,
    cut_draw,
    microbatch_rows,
    poisson_draw,
    shuffled_batches,
    zeroed,
)

KEY = noise.key_from_seed(1)

# From Python 3.12, forking workers from a process in which torch has threads warns.
forks_workers = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def inclusions_TN(steps: int, rows: int, rate: float) -> torch.Tensor:
    drawn_TN = torch.zeros(steps, rows, dtype=torch.float64)
    for step in range(steps):
        drawn_TN[step, poisson_draw(KEY, step, rows, rate)] = 1
    return drawn_TN


# The Poisson draw


@pytest.mark.parametrize("rate", [0.003, 0.1, 0.5, 0.97])
def test_each_row_is_drawn_with_the_sample_rate(rate):
    """Counts per row and per step have the mean and the spread of independent coins (chi-square, 4.5 sigma).

    Seen to fail with the gap one row too long, with `ceil` for `floor`, and with the step left out of the nonce.
    """
    steps, rows = 1500, 200
    drawn_TN = inclusions_TN(steps, rows, rate)
    variance = rate * (1 - rate)
    assert abs(drawn_TN.mean() - rate) < 4.5 * math.sqrt(variance / (steps * rows))
    for counts, trials in [(drawn_TN.sum(0), steps), (drawn_TN.sum(1), rows)]:
        chi_square = ((counts - trials * rate) ** 2).sum() / (trials * variance)
        kurtosis_excess = (1 - 6 * variance) / (trials * variance)
        spread = math.sqrt(len(counts) * (2 + kurtosis_excess))
        assert abs(chi_square - len(counts)) < 4.5 * spread


def test_rows_and_steps_are_independent():
    """Neighbouring rows, and one row in neighbouring steps, are uncorrelated. Seen to fail with a draw used twice."""
    drawn_TN = inclusions_TN(2000, 200, 0.3)
    centred_TN = (drawn_TN - 0.3) / math.sqrt(0.3 * 0.7)
    for lag in (1, 2, 7, 8, 64):
        for one, other in [(centred_TN[:, lag:], centred_TN[:, :-lag]), (centred_TN[lag:], centred_TN[:-lag])]:
            assert abs((one * other).mean()) < 4.5 / math.sqrt(one.numel())


def test_keys_draw_independently():
    one, other = (poisson_draw(key, 0, 10**5, 0.1) for key in (KEY, noise.key_from_seed(2)))
    both = np.intersect1d(one.numpy(), other.numpy()).size
    assert abs(both - 1000) < 4.5 * math.sqrt(990)


def test_draw_is_sorted_unique_and_a_function_of_key_and_step():
    for step, rate in itertools.product((0, 1, 2**40, 2**64 - 1), (0.001, 0.5, 1.0)):
        drawn = poisson_draw(KEY, step, 5000, rate)
        assert drawn.dtype == torch.int64
        assert torch.equal(drawn, drawn.unique())
        assert drawn.min() >= 0 and drawn.max() < 5000
        assert torch.equal(drawn, poisson_draw(KEY, step, 5000, rate))


def test_sample_rate_one_draws_every_row_and_zero_none():
    for rows in (1, 7, 1000):
        assert poisson_draw(KEY, 3, rows, 1.0).tolist() == list(range(rows))
        assert poisson_draw(KEY, 3, rows, 0.0).tolist() == []
    assert poisson_draw(KEY, 3, 1000, math.nextafter(1.0, 0.0)).tolist() == list(range(1000))


def test_tiny_sample_rate_on_a_huge_dataset():
    """q = 1e-12 of 2^40 rows: about 1.1 rows a step, anywhere, in time that does not depend on N."""
    rows, rate, steps = 2**40, 1e-12, 3000
    draws = [poisson_draw(KEY, step, rows, rate) for step in range(steps)]
    expected = steps * rows * rate
    drawn = torch.cat(draws).double() / rows
    assert abs(len(drawn) - expected) < 4.5 * math.sqrt(expected)
    assert abs(drawn.mean() - 0.5) < 4.5 / math.sqrt(12 * expected)
    empty = sum(len(draw) == 0 for draw in draws) / steps
    p_empty = math.exp(-rows * rate)
    assert abs(empty - p_empty) < 4.5 * math.sqrt(p_empty / steps)
    assert len(poisson_draw(KEY, 0, 10**6, 1e-300)) == 0


def test_long_draws_take_several_helpings_of_keystream(monkeypatch):
    """The same rows, however many gaps are drawn at a time."""
    whole = poisson_draw(KEY, 0, 100_000, 0.2)
    monkeypatch.setattr(sampling, "_MAX_SKIPS_AT_A_TIME", 1024)
    assert torch.equal(poisson_draw(KEY, 0, 100_000, 0.2), whole)


@pytest.mark.parametrize(
    "integer", [0, 1, 3, 2**11, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2**11, 2**64 - 1]
)
def test_exponential_is_precise_at_both_ends(integer):
    """-ln(1 - x / 2^64) to the last bits, at 2^-64 and at 44.4, against 50 decimal digits.

    Seen to fail with log alone (nothing below 1e-16) and with log1p alone (nothing above 36.7).
    """
    low, high = torch.tensor([integer % 2**32]), torch.tensor([integer >> 32])
    with localcontext() as context:
        context.prec = 50
        expected = float(-((Decimal(2**64 - integer) / Decimal(2**64)).ln()))
    assert sampling._exponential(low, high).item() == pytest.approx(expected, rel=1e-15, abs=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": -1}, "step"),
        ({"dataset_size": 0}, "dataset_size"),
        ({"dataset_size": 2**40 + 1}, "dataset_size"),
        ({"sample_rate": 1.01}, "sample_rate"),
        ({"sample_rate": -0.1}, "sample_rate"),
        ({"sample_rate": math.nan}, "sample_rate"),
        ({"key": b"short"}, "expected 32"),
    ],
)
def test_draw_refuses_what_it_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        poisson_draw(**{"key": KEY, "step": 0, "dataset_size": 10, "sample_rate": 0.5, **options})
    with pytest.raises(OverflowError, match="nonce"):
        poisson_draw(KEY, 2**64, 10, 0.5)


# Shuffling


def test_shuffle_takes_each_row_at_most_once_an_epoch():
    for epoch in range(3):
        batches = shuffled_batches(KEY, epoch, 103, 10)
        assert batches.shape == (10, 10) and batches.dtype == torch.int64
        assert batches.unique().numel() == 100
        assert batches.min() >= 0 and batches.max() < 103
    assert shuffled_batches(KEY, 0, 7, 7).sort().values.tolist() == [list(range(7))]
    with pytest.raises(ValueError, match="batch_size: found 8"):
        shuffled_batches(KEY, 0, 7, 8)


def test_shuffle_is_uniform_and_fresh_every_epoch():
    """Every row is as likely at every position (chi-square). Seen to fail with the epoch left out of the nonce."""
    epochs, rows = 4000, 8
    orders = torch.stack([shuffled_batches(KEY, epoch, rows, rows)[0] for epoch in range(epochs)])
    counts = torch.nn.functional.one_hot(orders).sum(0).double()
    chi_square = ((counts - epochs / rows) ** 2 / (epochs / rows)).sum()
    freedom = (rows - 1) ** 2
    assert abs(chi_square - freedom) < 4.5 * math.sqrt(2 * freedom)
    assert len({tuple(order) for order in orders.tolist()}) > 3500  # of 8! = 40 320 orders, 3 810 are expected


# Draws cut to a largest size


def test_a_cut_keeps_a_uniform_choice():
    """Every row of a draw of 12 is as likely to stay, alone and with each other (chi-square). Seen to fail with the first."""
    drawn = torch.arange(12) * 3
    kept_TN = torch.zeros(4000, 12)
    for step in range(4000):
        kept = cut_draw(drawn, KEY, step, 5)
        assert len(kept) == 5 == kept.unique().numel() and torch.equal(kept, kept.sort().values)
        kept_TN[step, kept // 3] = 1
    expected = 4000 * 5 / 12
    chi_square = ((kept_TN.sum(0) - expected) ** 2).sum() / (4000 * 5 / 12 * 7 / 12) * 11 / 12
    assert abs(chi_square - 11) < 4.5 * math.sqrt(22)
    together = (kept_TN.T @ kept_TN)[~torch.eye(12, dtype=torch.bool)]
    assert (together / 4000 - 5 * 4 / (12 * 11)).abs().max() < 4.5 * math.sqrt(0.152 * 0.848 / 4000)


def test_small_draws_are_not_cut():
    for drawn in (torch.empty(0, dtype=torch.int64), torch.arange(5)):
        assert cut_draw(drawn, KEY, 0, 5) is drawn


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_cap_gives_every_step_the_same_shape(world_size):
    """Seen to fail when an empty draw has one microbatch."""
    privacy = config(max_batch_size=14, accountant="pld")
    recorders = [Recorder() for _ in range(world_size)]
    loaders = [
        make_loader(recorder=r, rank=rank, world_size=world_size, privacy=privacy, steps=60)
        for rank, r in enumerate(recorders)
    ]
    sizes = []
    for number, batches in enumerate(zip(*loaders, strict=True)):
        shares = [taken(batch, recorder) for batch, recorder in zip(batches, recorders, strict=True)]
        rows = sorted(itertools.chain(*shares))
        assert set(rows) <= set(expected_rows(number)) and len(rows) == min(14, len(expected_rows(number)))
        sizes.append(len(rows))
    assert max(sizes) == 14 > min(sizes)
    for recorder in recorders:
        masks = sum(isinstance(call, torch.Tensor) for call in recorder.calls)
        assert masks == 60 * math.ceil(math.ceil(14 / world_size) / 4)


@pytest.mark.parametrize("workers", [{}, pytest.param({"num_workers": 1}, marks=forks_workers)])
def test_a_row_that_cannot_be_read_is_named(workers):
    class Broken(Squares):
        def __getitem__(self, index):
            raise OSError("Input/output error") if index else IndexError("no zero row")

    with pytest.raises((OSError, IndexError)) as caught:
        for batch in make_loader(Broken(), **workers):
            list(batch)
    told = str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))
    assert "while Broken read a microbatch of" in told and "this was row" in told


# The split over ranks


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("drawn", [0, 1, 2, 3, 4, 5, 11, 12, 13, 100])
def test_ranks_share_the_draw(world_size, drawn):
    """Together the whole draw, no row twice, as many microbatches on every rank, of one size, padding at the end.

    Seen to fail with the number of microbatches taken from the rank's own share.
    """
    rows = poisson_draw(KEY, 0, drawn, 1.0) * 7 if drawn else torch.empty(0, dtype=torch.int64)
    ranks = [microbatch_rows(rows, 4, rank, world_size) for rank in range(world_size)]
    expected = max(1, math.ceil(math.ceil(drawn / world_size) / 4))
    assert {len(microbatches) for microbatches in ranks} == {expected}
    assert {len(microbatch) for microbatches in ranks for microbatch in microbatches} == {4}
    for microbatches in ranks:
        flat = list(itertools.chain(*microbatches))
        assert PADDING not in flat[: len(flat) - flat.count(PADDING)]
    real = [row for microbatches in ranks for microbatch in microbatches for row in microbatch if row != PADDING]
    assert sorted(real) == rows.tolist()


# The loader


class Squares(Dataset):
    """Row i holds i + 1 and row 0 a NaN too, so that zeros are no row of the dataset and 0 * row is no zeros."""

    def __init__(self, rows: int = 100) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} does not exist")
        return torch.tensor([index + 1.0, math.nan if index == 0 else 0.0]), index


class Recorder:
    """The three callbacks of the engine, written down in order."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.refuse = False

    def on_logical_batch(self) -> None:
        if self.refuse:
            raise RuntimeError("sums are pending")
        self.calls.append("logical batch")

    def on_microbatch(self, mask_B: torch.Tensor) -> None:
        self.calls.append(mask_B)

    def on_logical_batch_end(self) -> None:
        self.calls.append("end")


def config(rows: int = 100, batch: int = 10, **options) -> PrivacyConfig:
    return PrivacyConfig(
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        expected_batch_size=batch,
        dataset_size=rows,
        target_delta=1e-9,
        **options,
    )


def make_loader(
    dataset=None, recorder=None, *, privacy=None, steps=3, microbatch_size=4, rank=0, world_size=1, **kwargs
):
    dataset = Squares() if dataset is None else dataset
    recorder = recorder or Recorder()
    return LogicalBatchLoader(
        dataset,
        privacy=privacy or config(len(dataset)),
        key=KEY,
        microbatch_size=microbatch_size,
        steps=steps,
        rank=rank,
        world_size=world_size,
        on_logical_batch=recorder.on_logical_batch,
        on_microbatch=recorder.on_microbatch,
        on_logical_batch_end=recorder.on_logical_batch_end,
        dataloader_kwargs=kwargs,
    )


def expected_rows(number: int, rows: int = 100, rate: float = 0.1) -> list[int]:
    return poisson_draw(KEY, number, rows, rate).tolist()


def taken(logical_batch, recorder: Recorder) -> list[int]:
    """The rows of a logical batch that its masks call real, checking masks, shapes and padding on the way."""
    rows = []
    for features, index in logical_batch:
        mask_B = recorder.calls[-1]
        assert mask_B.dtype == torch.bool and mask_B.shape == (4,) == index.shape and features.shape == (4, 2)
        assert torch.equal(features[mask_B, 0], index[mask_B] + 1.0)
        assert not features[~mask_B].any() and not index[~mask_B].any()
        rows += index[mask_B].tolist()
    return rows


WORKERS = [
    {},
    pytest.param({"num_workers": 2}, marks=forks_workers),
    pytest.param({"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4}, marks=forks_workers),
]


@pytest.mark.parametrize("workers", WORKERS)
def test_loader_hands_out_the_draws(workers):
    """Rows of the draw, masked zero rows, and fresh draws in a second iteration; prefetched or not.

    Seen to fail with the mask of the newest planned microbatch, not of the one handed out (num_workers > 0).
    """
    recorder = Recorder()
    loader = make_loader(recorder=recorder, **workers)
    assert len(loader) == 3
    for iteration in range(2):
        for number, logical_batch in enumerate(loader):
            assert taken(logical_batch, recorder) == expected_rows(3 * iteration + number)
        assert number == 2


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_together_hand_out_the_draw(world_size):
    recorders = [Recorder() for _ in range(world_size)]
    loaders = [make_loader(recorder=r, rank=rank, world_size=world_size) for rank, r in enumerate(recorders)]
    for number, logical_batches in enumerate(zip(*loaders, strict=True)):
        shares = [taken(batch, recorder) for batch, recorder in zip(logical_batches, recorders, strict=True)]
        assert sorted(itertools.chain(*shares)) == expected_rows(number)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    masks_per_rank = {sum(isinstance(call, torch.Tensor) for call in recorder.calls) for recorder in recorders}
    assert len(masks_per_rank) == 1


def test_callbacks_come_in_order():
    recorder = Recorder()
    for logical_batch in make_loader(recorder=recorder, steps=2):
        assert recorder.calls[-1] == "logical batch"
        for _ in logical_batch:
            assert isinstance(recorder.calls[-1], torch.Tensor)
        assert recorder.calls[-2] == "end"
        assert list(logical_batch) == []
    names = [call if isinstance(call, str) else "microbatch" for call in recorder.calls]
    counts = [math.ceil(len(expected_rows(number)) / 4) for number in range(2)]
    assert names == [name for n in counts for name in ["logical batch", *["microbatch"] * (n - 1), "end", "microbatch"]]


@pytest.mark.parametrize("workers", WORKERS[:2])
@pytest.mark.parametrize("microbatches", [0, 1])
def test_what_is_left_of_a_logical_batch_is_dropped_silently(workers, microbatches):
    """Seen to fail without draining: the next logical batch began with the rows that were left."""
    recorder = Recorder()
    batches = iter(make_loader(recorder=recorder, steps=2, **workers))
    first = next(batches)
    for _ in range(microbatches):
        next(first)
    calls = len(recorder.calls)
    second = next(batches)
    assert recorder.calls[calls:] == ["logical batch"]
    assert taken(second, recorder) == expected_rows(1)
    assert recorder.calls.count("end") == 1
    assert list(first) == []
    assert list(batches) == []


def test_end_is_told_also_when_the_last_microbatch_was_taken_by_next():
    recorder = Recorder()
    batches = iter(make_loader(recorder=recorder, microbatch_size=100))
    next(next(batches))
    assert recorder.calls[0] == "logical batch" and recorder.calls[1] == "end"


def test_engine_can_refuse_a_logical_batch():
    """It is not lost: the same draw comes when the engine agrees."""
    recorder = Recorder()
    batches = iter(make_loader(recorder=recorder))
    next(batches)
    recorder.refuse = True
    with pytest.raises(RuntimeError, match="pending"):
        next(batches)
    recorder.refuse = False
    assert taken(next(batches), recorder) == expected_rows(1)


@pytest.mark.parametrize("workers", WORKERS)
def test_an_iteration_left_early_repeats_no_draw(workers):
    """The next draw depends on what was handed out, not on what workers have prefetched, so ranks stay together.

    Seen to fail with draws counted where they are planned.
    """
    recorder = Recorder()
    loader = make_loader(recorder=recorder, steps=None, **workers)
    seen = []
    for stop_after in (1, 2, 3):
        for _, logical_batch in zip(range(stop_after), loader, strict=False):
            seen.append(taken(logical_batch, recorder))
    assert seen == [expected_rows(number) for number in range(6)]


def test_only_the_newest_iteration_goes_on():
    loader = make_loader()
    old = iter(loader)
    left_over = next(old)
    new = iter(loader)
    for stale in (old, left_over):
        with pytest.raises(RuntimeError, match="newer one of the same loader"):
            next(stale)
    next(new)


def test_empty_draw_gives_one_microbatch_of_padding():
    recorder = Recorder()
    loader = make_loader(recorder=recorder, privacy=config(100, 1), steps=60, microbatch_size=4)
    empty = [number for number in range(60) if not expected_rows(number, rate=0.01)]
    assert empty
    for number, logical_batch in enumerate(loader):
        microbatches = 0
        for features, _ in logical_batch:
            microbatches += 1
            if number in empty:
                assert not recorder.calls[-1].any() and not features.any()
        assert microbatches == max(1, math.ceil(len(expected_rows(number, rate=0.01)) / 4))


def test_sample_rate_one_hands_out_every_row():
    recorder = Recorder()
    for logical_batch in make_loader(recorder=recorder, privacy=config(100, 100)):
        assert taken(logical_batch, recorder) == list(range(100))


@pytest.mark.parametrize("world_size", [1, 3])
def test_shuffle_hands_out_each_row_at_most_once_an_epoch(world_size):
    """Three batches of 30 an epoch of 100 rows, across epochs and across iterations."""
    privacy = config(100, 30, sampling="shuffle")
    recorders = [Recorder() for _ in range(world_size)]
    loaders = [
        make_loader(recorder=r, privacy=privacy, steps=3, rank=rank, world_size=world_size)
        for rank, r in enumerate(recorders)
    ]
    epochs = []
    for _ in range(2):
        epoch: list[int] = []
        for logical_batches in zip(*loaders, strict=True):
            pairs = zip(logical_batches, recorders, strict=True)
            batch = list(itertools.chain.from_iterable(taken(b, r) for b, r in pairs))
            assert len(batch) == 30
            epoch += batch
        assert len(set(epoch)) == 90
        epochs.append(epoch)
    assert epochs[0] != epochs[1]


def test_endless_loader_has_no_length():
    loader = make_loader(steps=None)
    with pytest.raises(TypeError, match="endless"):
        len(loader)
    assert len(list(itertools.islice(loader, 10))) == 10
    assert list(make_loader(steps=0)) == []


# Rows, collation, workers


Pair = namedtuple("Pair", "x y")


def test_zero_row_keeps_structure_shapes_and_dtypes():
    """Also where a row holds NaN. Seen to fail with `0 * leaf`."""
    row = {
        "ids": torch.tensor([3, 4]),
        "nested": [Pair(torch.full((2, 3), math.nan, dtype=torch.bfloat16), 5), (2.5, True, None)],
        "array": np.array([[1.5, np.nan]], dtype=np.float32),
        "scalar": np.int16(7),
        "text": "secret",
        "bytes": b"secret",
    }
    found = zeroed(row)
    assert torch.equal(found["ids"], torch.zeros(2, dtype=torch.int64))
    pair, (real, flag, nothing) = found["nested"]
    assert isinstance(pair, Pair) and torch.equal(pair.x, torch.zeros(2, 3, dtype=torch.bfloat16))
    assert (pair.y, real, flag, nothing) == (0, 0.0, False, None)
    assert flag is False and isinstance(real, float)
    assert found["array"].dtype == np.float32 and found["array"].tolist() == [[0.0, 0.0]]
    assert found["scalar"] == 0 and isinstance(found["scalar"], np.int16)
    assert (found["text"], found["bytes"]) == ("", b"")
    assert row["ids"].tolist() == [3, 4]


def test_zero_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"dataset: a row holds a builtins\.object.*__getitem__"):
        zeroed({"x": torch.zeros(1), "image": object()})


def test_rows_may_be_dicts():
    rows = [{"x": torch.full((3,), float(i + 1)), "name": f"row {i}", "label": i} for i in range(100)]
    recorder = Recorder()
    for number, logical_batch in enumerate(make_loader(rows, recorder)):
        names: list[str] = []
        for batch in logical_batch:
            mask_B = recorder.calls[-1]
            assert batch["x"].shape == (4, 3) and torch.equal(batch["x"][:, 0] != 0, mask_B)
            names += [name for name in batch["name"] if name]
        assert names == [f"row {row}" for row in expected_rows(number)]


def mixed(rows: list[torch.Tensor]) -> torch.Tensor:
    x = torch.stack(rows)
    return 0.5 * x + 0.5 * x[torch.randperm(len(x))]


def with_the_row_before(rows: list[torch.Tensor]) -> torch.Tensor:
    x = torch.stack(rows)
    x[1:] += x[:-1].clone()
    return x


class RunningMean:
    def __init__(self) -> None:
        self.mean = torch.zeros(3)

    def __call__(self, rows: list[torch.Tensor]) -> torch.Tensor:
        x, mean = torch.stack(rows), self.mean
        self.mean = 0.9 * mean + 0.1 * x.mean(0)
        return x - mean


def padded_and_masked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """As collators of masked language models do: rows are taken apart, and positions are drawn."""
    x = nn.utils.rnn.pad_sequence([row.pop("x") for row in rows], batch_first=True)
    return {"x": torch.where(torch.rand(x.shape) < 0.5, 0.0, x), "length": torch.tensor([random.random() for _ in x])}


COUPLING: dict[str, Callable[[list[torch.Tensor]], Any]] = {
    "mixup": mixed,
    "mixup in a mapping": lambda rows: UserDict(x=mixed(rows)),
    "mixup in a class": lambda rows: SimpleNamespace(x=mixed(rows)),
    "less the first": lambda rows: torch.stack(rows) - rows[0],
    "with the row before": with_the_row_before,
    "less the mean": lambda rows: torch.stack(rows) - torch.stack(rows).mean(0),
    "sorted": lambda rows: torch.stack(sorted(rows, key=lambda x: float(x[0]))),
    "backwards": lambda rows: torch.stack(rows[::-1]),
}


@pytest.mark.parametrize("name", COUPLING)
def test_collate_fn_that_mixes_or_moves_rows_is_refused(name: str) -> None:
    """Seen to be accepted, with an epsilon."""
    torch.manual_seed(0)
    collate, rows = Collating(COUPLING[name]), torch.randn(4, 8, 3).unbind(0)
    with pytest.raises(PrivacyError, match="collate_fn: a row came out otherwise"):
        for x in rows:
            collate(list(x))


def test_collate_fn_that_keeps_something_of_rows_is_refused() -> None:
    """Seen to be accepted: each microbatch less the mean of those before."""
    with pytest.raises(PrivacyError, match="keeps something of rows"):
        Collating(RunningMean())(list(torch.randn(8, 3)))


def test_loader_asks_its_collate_fn() -> None:
    with pytest.raises(PrivacyError, match="collate_fn"):
        for logical_batch in make_loader(collate_fn=lambda rows: default_collate(rows[::-1])):
            for _ in logical_batch:
                pass


def test_collate_fn_that_takes_rows_apart_is_as_it_is() -> None:
    """With the random numbers that it would have drawn."""

    def batches(collate: Any) -> list[Any]:
        torch.manual_seed(0)
        random.seed(0)
        lengths = [[5, 2, 3], [1, 1, 5], [4, 4, 4], *[[2, 3, 1]] * 8]
        return [collate([{"x": torch.ones(n) * i} for i, n in enumerate(of_one, 1)]) for of_one in lengths]

    for x, y in zip(batches(Collating(padded_and_masked)), batches(padded_and_masked), strict=True):
        assert torch.equal(x["x"], y["x"])
        assert torch.equal(x["length"], y["length"])


def as_many_as_the_row_needs(rows: list[torch.Tensor]) -> torch.Tensor:
    """As whole words are masked: how many numbers a row draws depends on it."""
    return torch.stack([row * sum(random.random() for _ in range(1 + int(row[0] > 0))) for row in rows])


def with_names(rows: list[torch.Tensor]) -> dict[str, Any]:
    return {
        "x": torch.stack(rows),
        "name": np.array([f"row {i}" for i in range(len(rows))]),
        "day": np.datetime64("2026-01-01"),
    }


@pytest.mark.parametrize("collate", [as_many_as_the_row_needs, with_names])
def test_collate_fn_that_draws_by_row_or_names_rows_is_as_it_is(collate: Any) -> None:
    """Seen to fail with a TypeError: torch has no strings."""
    asked = Collating(collate)
    for x in torch.randn(8, 8, 3).unbind(0):
        asked(list(x))


class CollatingModel(nn.Linear):
    copies = 0

    def __deepcopy__(self, memo: Any) -> Any:
        CollatingModel.copies += 1
        return self

    def collate(self, rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(rows)


@pytest.mark.parametrize("held", [False, True])
def test_collate_fn_is_asked_without_a_copy_of_a_model(held: bool) -> None:
    """Seen to be copied, whatever its size: transformers' DataCollatorForSeq2Seq has one, and others are a method of one."""
    CollatingModel.copies, model = 0, CollatingModel(3, 3)
    holder = OwnGenerator()
    holder.model = model  # type: ignore[attr-defined]
    Collating(holder if held else model.collate)(list(torch.randn(8, 3)))
    assert CollatingModel.copies == 0


class OwnGenerator:
    """As transformers' DataCollatorForLanguageModeling(seed=...)."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(rows) * (torch.rand(len(rows), 3, generator=self.generator) < 0.5)


def test_collate_fn_draws_from_a_generator_of_its_own() -> None:
    """Seen to be refused, as if one row moved others."""
    rows = torch.randn(4, 8, 3).unbind(0)
    for x, y in zip(map(Collating(OwnGenerator()), map(list, rows)), map(OwnGenerator(), map(list, rows)), strict=True):
        assert torch.equal(x, y)


def test_rows_that_cannot_be_copied_are_named() -> None:
    rows = list(torch.randn(2, 3, requires_grad=True) * 2)
    with pytest.raises(PrivacyError, match="a row of the dataset cannot be copied"):
        Collating(torch.stack)(rows)


def test_collate_fn_whose_draws_nobody_can_repeat_is_refused() -> None:
    owner = OwnGenerator()
    with pytest.raises(PrivacyError, match="asked twice about the same rows"):
        Collating(lambda rows: owner(rows))(list(torch.randn(8, 3)))


def sum_collate(rows: list[tuple[torch.Tensor, int]]) -> tuple[int, list[int]]:
    return len(rows), [label for _, label in rows]


def test_collate_fn_is_honoured():
    for logical_batch in make_loader(collate_fn=sum_collate):
        for length, labels in logical_batch:
            assert length == 4 == len(labels)


class Batched(Squares):
    """Offers the batched access that torch's DataLoader uses where it is there."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        raise AssertionError("__getitems__ is there and should be used")

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        return [Squares.__getitem__(self, index) for index in indices]


def test_batched_access_is_used():
    recorder = Recorder()
    for number, logical_batch in enumerate(make_loader(Batched(), recorder)):
        assert taken(logical_batch, recorder) == expected_rows(number)


def mark_worker(worker: int) -> None:
    torch.utils.data.get_worker_info().dataset.dataset.rows = 1000 + worker


class WorkerSquares(Squares):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([index + 1.0, 0.0]), self.rows


@forks_workers
def test_dataloader_options_pass_through():
    loader = make_loader(WorkerSquares(), num_workers=1, worker_init_fn=mark_worker, timeout=60)
    _, labels = next(next(iter(loader)))
    assert labels[0] == 1000


class Broken(Squares):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == expected_rows(0)[4]:
            raise self.error("no such file")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", WORKERS[:2])
def test_error_of_a_row_ends_the_iteration(workers):
    """Masks and microbatches could no longer be told to belong together. Seen to fail without the check."""
    batches = iter(make_loader(Broken(OSError), **workers))
    first = next(batches)
    next(first)
    with pytest.raises(OSError, match="no such file") as raised:
        next(first)
    # torch's traceback refers to itself and to the workers, which then wait 5 s each for the garbage collector.
    raised.value.__traceback__ = None
    del raised
    for stale in (first, batches):
        with pytest.raises(RuntimeError, match="loading a microbatch failed"):
            next(stale)


def test_stop_iteration_of_a_row_does_not_end_the_batch_silently():
    first = next(iter(make_loader(Broken(StopIteration))))
    next(first)
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        next(first)


# What is refused


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(100))

    def __len__(self) -> int:
        return 100


class Unsized(Dataset):
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("option", ["batch_size", "sampler", "shuffle", "batch_sampler", "drop_last", "in_order"])
def test_options_that_override_the_draws_are_refused(option):
    with pytest.raises(ValueError, match=f"^{option}: .*leave {option} out"):
        make_loader(**{option: False})


def test_datasets_that_cannot_be_drawn_from_are_refused():
    with pytest.raises(TypeError, match="Stream, but it is an IterableDataset; expected a map-style dataset"):
        make_loader(Stream())
    with pytest.raises(TypeError, match="Unsized, but it has no __len__"):
        make_loader(Unsized(), privacy=config())
    with pytest.raises(TypeError, match="found a DataLoader; pass its dataset"):
        make_loader(DataLoader(list(range(100))))
    with pytest.raises(ValueError, match=r"found 100 rows, expected privacy.dataset_size=101"):
        make_loader(privacy=config(101))


def test_external_poisson_brings_its_own_loader():
    with pytest.raises(ValueError, match=r"external_poisson.*bring your own loader.*engine.microbatch\(mask\)"):
        make_loader(privacy=config(sampling="external_poisson"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"microbatch_size": 0}, "microbatch_size: found 0"),
        ({"steps": -1}, "steps: found -1"),
        ({"rank": 2, "world_size": 2}, "rank: found 2"),
    ],
)
def test_counts_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(**options)


def test_loader_is_not_copied_or_pickled():
    """A copy would repeat draws, and a pickle would hold the key."""
    loader = make_loader()
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            duplicate(loader)
