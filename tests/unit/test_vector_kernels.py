"""Norms and weighted sums of vectors, side by side, from kernels in Triton's interpreter, against their torch references."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fsdp_dp.gradients import Materialized, OuterProduct, PerSampleGradient
from fsdp_dp.kernels import vectors
from fsdp_dp.together import NormTally, weighted_sums
from tests.unit.interpreted import interpreter

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with interpreter():
        import fsdp_dp.kernels.vectors_triton  # noqa: F401

        monkeypatch.setattr(vectors, "usable", lambda x: x.dtype == torch.float32)
        yield


def stored(rows: int, widths: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows + sum(widths))
    return [torch.randn(rows, width, generator=generator).to(dtype) for width in widths]


@pytest.mark.parametrize("rows", [1, 5])
def test_norms_of_the_vectors_of_several_groups(rows: int) -> None:
    """More columns than a program reads at a time, fewer, one; no owner's stand together, one group has none.

    Seen to fail when a run begins a column late.
    """
    values, owners = stored(rows, [1500, 1, 33, 700, 2]), [1, 0, 1, 3, 0]
    tally = NormTally(rows, torch.device("cpu"))
    tally.add([Materialized(x) for x in values], owners)
    terms = tally.measured(4).of_groups()
    for group in range(4):
        exact = sum(
            (x.double().square().sum(1) for x, owner in zip(values, owners, strict=True) if owner == group),
            torch.zeros(rows, dtype=torch.float64),
        )
        assert ((terms.norm_sq[group] - exact).abs() <= terms.error[group]).all()
        assert (terms.error[group] <= 1e-9 * exact).all()
        torch.testing.assert_close(terms.rounding_sq[group], exact * (4 * 2.0**-24) ** 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [1, 5])
def test_weighted_sums_of_vectors_have_the_weights_of_their_owners(rows: int) -> None:
    """Rows of weight zero hold what they like; a double goes the other way. Seen to fail when all have the first weights."""
    values, owners = stored(rows, [300, 1, 33, 2]), [2, 0, 2, 1]
    values.append(stored(rows, [7], torch.float64)[0])
    owners.append(1)
    weight = torch.rand(3, rows) + 0.1
    weight[2, -1] = 0.0
    for x, owner in zip(values, owners, strict=True):
        if owner == 2:
            x[-1, 0] = NAN
    named = {str(n): Materialized(x) for n, x in enumerate(values)}
    sums = weighted_sums(named, weight, weight > 0, owners={str(n): owner for n, owner in enumerate(owners)})
    for (name, gradient), owner in zip(named.items(), owners, strict=True):
        kept = weight[owner] > 0
        exact = (weight[owner, kept].double()[:, None] * gradient.value[kept].double()).sum(0)
        torch.testing.assert_close(sums[name].double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_sums_are_written_to_their_places_in_a_bucket(shards: int) -> None:
    """Wider than a program's columns, and less; columns of a wider memory; one without a place. What lies between stays.

    Seen to fail when a shard is written where the one before it was, and when rows are read as far apart as they are wide.
    """
    rows, widths = 3, [4 * 140, 4, 16]
    memory = torch.randn(rows, 3 + sum(widths), generator=torch.Generator().manual_seed(0))
    values = dict(zip("abc", memory[:, 3:].split(widths, 1), strict=True)) | {"d": stored(rows, [7])[0]}
    bucket = torch.full((shards, 5 + sum(widths) // shards), NAN)
    parts = bucket[:, 5:].split([width // shards for width in widths], 1)
    into = dict(zip("abc", parts, strict=True))
    weight, owners = torch.rand(2, rows) + 0.1, dict(zip("abcd", [1, 0, 1, 0], strict=True))
    named = {name: Materialized(x) for name, x in values.items()}
    sums = weighted_sums(named, weight, weight > 0, into, owners)
    assert all(sums[name] is part for name, part in into.items()) and bucket[:, :5].isnan().all()
    for name, x in values.items():
        exact = weight[owners[name]].double() @ x.double()
        torch.testing.assert_close(sums[name].flatten().double(), exact, rtol=1e-6, atol=1e-6)


def test_a_place_of_another_size_is_not_written_to() -> None:
    """A rule whose gradient is not of its parameter's shape would write beyond the place. Seen to fail without the check."""
    (x,) = stored(3, [40])
    memory = torch.full((2, 30), NAN)
    weight = torch.rand(3) + 0.1
    sums = weighted_sums({"a": Materialized(x)}, weight, weight > 0, {"a": memory[:, :15]})
    assert memory.isnan().all() and sums["a"].shape == (40,)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_what_cannot_be_measured_is_not_finite() -> None:
    (x,) = stored(3, [40])
    x[0, 3], x[1, 39] = NAN, INF
    tally = NormTally(3, torch.device("cpu"))
    tally.add([Materialized(x), Materialized(x[:, :1].clone())], [0, 1])
    terms = tally.measured(2).of_groups()
    assert torch.isfinite(terms.norm_sq[0]).tolist() == [False, False, True]
    assert torch.isfinite(terms.norm_sq[1]).all()
    assert torch.isfinite(terms.error[0]).tolist() == [False, False, True]


def test_weights_of_float64_sums_go_past_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that compute in float32, or in half precision, of a model in float64: compiled kernels refuse such weights, with
    an error of the compiler's, and quotients of these overflow. Seen to fail when kernels are asked by the layer's format.
    """
    from fsdp_dp.kernels import outer

    monkeypatch.setattr(outer, "_runs_on", lambda device: True)
    monkeypatch.setattr(vectors, "weighted_sum", _refuse)
    monkeypatch.setattr(outer, "weighted_outers", _refuse)
    (x,) = stored(2, [40])
    a, g = (y.bfloat16().view(2, 5, 8) for y in stored(2, [40, 40]))
    weight = torch.tensor([[2.0**63, 2.0**-130], [0.5, 0.0]], dtype=torch.float64)
    named: dict[str, PerSampleGradient] = {"vector": Materialized(x), "matrix": OuterProduct(a, g)}
    sums = weighted_sums(named, weight, weight > 0, owners={"vector": 0, "matrix": 1})
    torch.testing.assert_close(sums["vector"].double(), weight[0] @ x.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums["matrix"].double(), 0.5 * g[0].double().T @ a[0].double(), rtol=1e-6, atol=1e-6)
    assert torch.isfinite(named["matrix"].weighted_sum(weight[0], weight[0] > 0)).all()


def _refuse(*_: object, **__: object) -> Tensor:
    raise AssertionError("a kernel was given weights in float64")
