"""The harness itself: values come back in rank order, and no failure is lost or hangs."""

import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import RankFailure, run


def add_ranks(rank: int, world_size: int, start: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = start + rank
    dist.all_reduce(total)
    return rank, total


def raise_on_one_rank(rank: int, world_size: int, bad_rank: int) -> None:
    if rank == bad_rank:
        raise ValueError(f"no luck on {rank}")
    dist.barrier()


def die_on_one_rank(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def hang_on_one_rank(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(600)


def warn(rank: int, world_size: int) -> None:
    warnings.warn("a rank's warning", UserWarning, stacklevel=1)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_values_come_back_in_rank_order(world_size: int) -> None:
    results = run(add_ranks, world_size, torch.ones(3))
    total = world_size + sum(range(world_size))
    assert [rank for rank, _ in results] == list(range(world_size))
    assert all(torch.equal(value, torch.full((3,), float(total))) for _, value in results)


def test_exception_on_one_rank_ends_all_and_names_it() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"rank 2 of 3 raised:[\s\S]*no luck on 2") as caught:
        run(raise_on_one_rank, 3, 2)
    assert caught.value.rank == 2
    assert isinstance(caught.value.exception, ValueError)
    assert time.monotonic() - start < 30


def test_silent_death_is_named_as_the_cause() -> None:
    with pytest.raises(RankFailure, match=r"rank 1 of 2 ended without an answer \(exit code 7\)"):
        run(die_on_one_rank, 2)


def test_hang_ends_at_the_timeout_with_the_stack() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"gave no answer within 5 s[\s\S]*hang_on_one_rank"):
        run(hang_on_one_rank, 2, timeout=5)
    assert time.monotonic() - start < 15


def test_ranks_have_the_warning_filters_of_the_test() -> None:
    with pytest.raises(RankFailure, match="UserWarning: a rank's warning"):
        run(warn, 1)
