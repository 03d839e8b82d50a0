"""Clipping in groups: updates are the oracle's for every grouping, clip function and division of the bound, per backend."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.distributed.backends import Training, disagreements, fail_if_any, played
from tests.oracle import Groups

PATTERNS = (("*attention*", "attention"), ("blocks.0.*", "first"), ("*", "rest"))
GROUPINGS: tuple[Any, ...] = ("flat", "block", "layer", "parameter", PATTERNS)
BOUNDS = ("uniform", "dimension")
FUNCTIONS = ("abadi", "automatic", "normalized")
BACKENDS = {1: ("plain",), 2: ("fsdp1", "fsdp1 shard_grad_op", "fsdp2", "fsdp2 root only"), 4: ("tp 2x2",)}
CASES = ("decoder", "tied", "checkpointed")


def covering(*factors: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Combinations in which every pair of values of two factors occurs, chosen greedily."""
    pairs = list(itertools.combinations(range(len(factors)), 2))
    missing = {(i, j, x, y) for i, j in pairs for x in factors[i] for y in factors[j]}
    while missing:
        best = max(itertools.product(*factors), key=lambda c: len({(i, j, c[i], c[j]) for i, j in pairs} & missing))
        missing -= {(i, j, best[i], best[j]) for i, j in pairs}
        yield best


def training(case: str, backend: str, clipping: Any, bounds: str, function: str) -> Training:
    if clipping == "parameter" and function == "normalized" and "tp" not in backend:
        case = (
            "inputs of rank 3"  # without key biases: their gradient is rounding alone, which this blows up to the bound
        )
    elif clipping == "parameter" and function == "normalized":
        clipping = "layer"
    groups = Groups(clipping=clipping, bounds=bounds, clip_function=function)
    return Training(
        case=case, backend=backend, groups=groups, microbatch=3, empty_last=True, steps=2, optimizer="momentum"
    )


FACTORS = (GROUPINGS, BOUNDS, FUNCTIONS)
PAIRWISE = {
    size: [training(*combination) for combination in covering(CASES, backends, *FACTORS)]
    for size, backends in BACKENDS.items()
}
# What only some models have: layers that are never called, that some rows call, that are called several times.
AWKWARD = [
    training(case, backend, clipping, "uniform", "abadi")
    for case in ("branches", "reused", "shared weights", "bare parameters", "partly frozen", "unit called twice")
    for backend in ("fsdp1", "fsdp2")
    for clipping in ("block", "layer")
]
AWKWARD += [training("routed", backend, "layer", "uniform", "normalized") for backend in ("fsdp1", "fsdp2")]
SPLIT_HEAD = [
    training("even decoder", "tp 2x2 split head", grouping, "uniform", "abadi") for grouping in ("block", "layer")
]
TASKS = {1: PAIRWISE[1], 2: PAIRWISE[2] + AWKWARD, 4: PAIRWISE[4] + SPLIT_HEAD}
results = functools.cache(lambda world_size: played(world_size, TASKS[world_size]))


@pytest.mark.parametrize("world_size", TASKS)
def test_updates_are_the_oracles(world_size: int) -> None:
    fail_if_any(disagreements(results(world_size)))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", BACKENDS)
def test_every_combination_is_the_oracles(world_size: int) -> None:
    tasks = [training(*c) for c in itertools.product(CASES, BACKENDS[world_size], *FACTORS)]
    fail_if_any(disagreements(played(world_size, tasks)))
