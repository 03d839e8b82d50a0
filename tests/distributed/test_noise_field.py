"""One seed, one noise field: whatever the sharding and the number of ranks, every element gets the same noise.

An empty draw (all rows masked) releases the noise alone, so fields can be compared to the bit.
"""

import functools
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fsdp_dp.noise import key_from_seed, standard_normal
from tests.distributed.backends import (
    BACKENDS,
    EXPECTED_BATCH_SIZE,
    Revealed,
    optimizer_for,
    played,
    privacy_config,
    seeded,
    whole_parameters,
)
from tests.oracle import Case, Decoder, FourPositions, Gradients, losses_of_four, relative_error, rows_of_step, share

BOUND, SIGMA, RELEASES = 0.35, 1.7, 3
# Large enough for statistics: 12 000 elements, of which no dimension is divisible by a number of ranks.
MODEL = Case(build=functools.partial(Decoder, hidden=401), rows=7)
# For what torch wants even: split positions, and shards of columns.
EVEN = Case(build=functools.partial(FourPositions, width=8, hidden=408), row_losses=losses_of_four, rows=7)


@dataclass(frozen=True, kw_only=True)
class Field:
    """Releases one after another from the same parameters, times the expected batch size: sums plus noise."""

    backend: str
    seed: int | None = 5
    noise_multiplier: float = SIGMA
    empty: bool = True
    releases: int = RELEASES
    dtype: torch.dtype = torch.float64
    even: bool = False

    def run(self) -> list[Gradients]:
        case = EVEN if self.even else MODEL
        privacy = privacy_config(max_grad_norm=BOUND, noise_multiplier=self.noise_multiplier, seed=self.seed)
        model, engine = seeded(lambda: BACKENDS[self.backend](case.model(self.dtype), privacy))
        revealed, (inputs, targets) = Revealed(model), case.batch()
        found = []
        for _ in range(self.releases):
            split = {"rank": engine.model.data_rank, "size": engine.model.data_size}
            for numbers, mask in share(range(case.rows), **split, microbatch=4):
                with engine.microbatch(mask & (not self.empty)):
                    case.row_losses(model(inputs[numbers]), targets[numbers]).mean().backward()
            found.append({n: g * EXPECTED_BATCH_SIZE for n, g in revealed.release().items()})
        engine.detach()
        return found


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Where some noised steps of momentum take the parameters, from the same data, dealt to whatever ranks there are."""

    backend: str
    steps: int = 3

    def run(self) -> Gradients:
        privacy = privacy_config(max_grad_norm=BOUND, noise_multiplier=0.3, seed=11)
        model, engine = seeded(lambda: BACKENDS[self.backend](MODEL.model(), privacy))
        optimizer = optimizer_for(self.backend, "momentum", model)
        inputs, targets = MODEL.batch()
        for step in range(self.steps):
            split = {"rank": engine.model.data_rank, "size": engine.model.data_size}
            for numbers, mask in share(rows_of_step(MODEL.rows, step), **split, microbatch=2):
                with engine.microbatch(mask):
                    MODEL.row_losses(model(inputs[numbers]), targets[numbers]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        engine.detach()
        return whole_parameters(model)


FSDP = ("fsdp1", "fsdp2")
UNSHARDED = ("fsdp1 no_shard", "ddp", "zero1")
HYBRID = ("fsdp1 hybrid", "fsdp1 hybrid zero2", "fsdp2 hybrid")
WITH_ROWS = tuple(
    Field(backend=backend, empty=False, noise_multiplier=sigma)
    for backend in (*FSDP, "tp 2x2")
    for sigma in (0.0, SIGMA)
)
TASKS: dict[int, tuple[Field | Trajectory, ...]] = {
    1: (*(Field(backend=backend) for backend in FSDP), *(Trajectory(backend=b) for b in (*FSDP, "ddp"))),
    2: (
        *(Field(backend=b) for b in (*FSDP, "fsdp1 shard_grad_op", "fsdp1 root only", "fsdp2 root only", "tp 1x2")),
        *(Field(backend=b, dtype=torch.float32) for b in ("fsdp1", "fsdp2 bf16")),
        *(Trajectory(backend=b) for b in (*FSDP, "fsdp1 shard_grad_op", *UNSHARDED, "tp 1x2", "tp alone")),
    ),
    3: tuple(Field(backend=backend) for backend in FSDP),
    4: (
        *(Field(backend=backend) for backend in (*FSDP, "tp 2x2", *HYBRID, "ddp")),
        *(Field(backend=backend, even=True) for backend in ("sp 2x2", "fsdp2 by columns", "tp 2x2 by columns")),
        *(Trajectory(backend=b) for b in (*FSDP, "fsdp1 shard_grad_op", *UNSHARDED, *HYBRID, "tp 2x2")),
        *(Trajectory(backend=b) for b in ("fsdp2 not resharded", "fsdp2 resharded to 2")),
        *WITH_ROWS,
    ),
}
results = functools.cache(lambda world_size: played(world_size, TASKS[world_size]))


@functools.cache
def reference(even: bool = False) -> list[Gradients]:
    """The field on one device."""
    return Field(backend="plain", even=even).run()


@functools.cache
def trajectory_alone() -> Gradients:
    return Trajectory(backend="plain").run()


@pytest.mark.parametrize("world_size", TASKS)
def test_every_sharding_draws_the_same_field_to_the_bit(world_size: int) -> None:
    for task, found in results(world_size).items():
        if isinstance(task, Field) and task.empty:
            for release, expected in zip(found, reference(task.even), strict=True):
                assert release.keys() == expected.keys()
                different = [n for n, x in expected.items() if not torch.equal(release[n], x.to(task.dtype))]
                assert not different, (task, different)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_sharding_takes_the_same_way(world_size: int) -> None:
    """Same seed, data and model, any number of ranks and any strategy: the same parameters, noise included."""
    alone = trajectory_alone()
    found = {task: where for task, where in results(world_size).items() if isinstance(task, Trajectory)}
    errors = {task.backend: relative_error(where, alone) for task, where in found.items()}
    assert max(errors.values()) < 1e-11, errors


def test_noise_is_added_to_the_sum_and_does_not_depend_on_it() -> None:
    """What sigma > 0 adds to the release of the same rows is that field, to the rounding of the sums."""
    found = results(4)
    for silent, noised in itertools.pairwise(WITH_ROWS):
        if silent.noise_multiplier == 0:
            for quiet, loud, expected in zip(found[silent], found[noised], reference(), strict=True):
                assert max(float(g.abs().max()) for g in quiet.values()) > 0.01
                for name, noise in expected.items():
                    assert torch.allclose(loud[name] - quiet[name], noise, rtol=0, atol=1e-11), (noised, name)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_a_range_of_normals_is_the_same_however_it_is_cut(parts: int) -> None:
    key, count = key_from_seed(0), 5003
    draw = functools.partial(standard_normal, key, release=1, parameter=2)
    edges = [count * part // parts for part in range(parts + 1)]
    pieces = [draw(start=a, count=b - a) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(pieces), draw(start=0, count=count))


def test_noise_has_standard_deviation_sigma_times_bound() -> None:
    for release in reference():
        values = torch.cat([x.flatten() for x in release.values()])
        assert abs(float(values.std()) / (SIGMA * BOUND) - 1) < 5 / (2 * values.numel()) ** 0.5
        for name, x in release.items():
            assert abs(float(x.mean())) < 5 * SIGMA * BOUND / x.numel() ** 0.5, name
            if x.numel() > 100:
                assert abs(float(x.std()) / (SIGMA * BOUND) - 1) < 5 / (2 * x.numel()) ** 0.5, name


def correlation(x: Tensor, y: Tensor) -> float:
    """In units of what independent samples have."""
    return float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]) * x.numel() ** 0.5


def test_noise_is_independent_over_steps_parameters_shards_and_elements() -> None:
    first, second, third = reference()
    name, other = "blocks.0.fc1.weight", "blocks.1.fc1.weight"
    assert abs(correlation(first[name], second[name])) < 5
    assert abs(correlation(first[name], third[name])) < 5
    assert abs(correlation(first[name], first[other])) < 5
    assert abs(correlation(first[name], second[other])) < 5
    for lag in (1, 2, 7, 128, 1024):
        flat = first[name].flatten()
        assert abs(correlation(flat[lag:], flat[:-lag])) < 5, lag
    half = len(first[name]) // 2
    assert abs(correlation(first[name][:half], first[name][-half:])) < 5


def test_no_noise_value_ever_repeats() -> None:
    """Not over elements, parameters or steps, and so not over ranks, which hold parts of this field; nor negated."""
    values = torch.cat([x.flatten() for release in reference() for x in release.values()]).abs()
    assert values.unique().numel() == values.numel()


def test_keys_differ_between_engines_unless_the_seed_is_fixed() -> None:
    def first(seed: int | None) -> Tensor:
        return Field(backend="plain", seed=seed, releases=1).run()[0]["token.weight"]

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))
    assert not torch.isin(first(None), first(None)).any()
