"""Sums over positions of the layers of a unit, from the kernel in Triton's interpreter, against float64."""

from collections.abc import Iterator, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_dp.columns import side_by_side
from fsdp_dp.gradients import Materialized, PerSampleGradient
from fsdp_dp.kernels import position_sums
from fsdp_dp.layers import per_sample_gradients
from fsdp_dp.records import NO_CALL, Record
from fsdp_dp.vector_gradients import SumOverPositions, formed
from tests.unit.interpreted import interpreter


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with interpreter():
        import fsdp_dp.kernels.position_sums_triton  # noqa: F401

        monkeypatch.setattr(position_sums, "usable", lambda g: g.numel() > 0)
        yield


def factors(B: int, T: int, C: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + B + T + C)
    a, g = (torch.randn(B, T, C, generator=generator).to(dtype) for _ in range(2))
    return a + 1, g


def stored(gradients: Mapping[str, PerSampleGradient]) -> dict[str, PerSampleGradient]:
    """`formed`, taken apart, in the order that was given."""
    others, joint = formed(gradients)
    found = {**others, **{name: x for one in joint for name, x in one.apart().items()}}
    return {name: found[name] for name in gradients}


def off(found: PerSampleGradient, expected: Tensor) -> float:
    return float((found.dense().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 24), (1, 1, 7), (3, 40, 33), (2, 300, 40)])
def test_norm_layers(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Seen to fail when padding columns count in the deviation of a centered layer."""
    a, g = factors(*shape, dtype)
    wide = shape[2:]
    for layer, normalized in (
        (nn.LayerNorm(wide, eps=1e-5), F.layer_norm(a.double(), wide, eps=1e-5)),
        (nn.RMSNorm(wide, eps=1e-5), F.rms_norm(a.double(), wide, eps=1e-5)),
    ):
        wanted = frozenset(dict(layer.named_parameters()))
        found = per_sample_gradients(layer, Record(NO_CALL, (a,), (g,), len(a)), wanted)
        assert all(type(x) is SumOverPositions for x in found.values()) and found.keys() == wanted
        made = stored(found)
        assert off(made["weight"], (normalized * g.double()).sum(1)) < 1e-6
        assert off(found["weight"], (normalized * g.double()).sum(1)) < 1e-6
        if "bias" in wanted:
            assert off(made["bias"], g.double().sum(1)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_all_of_a_unit_in_one_launch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norm layers and biases of several lengths and widths, wider than a tile, whose gradients some of them share.

    Seen to fail when a layer takes the input of another, when a second layer with the same output gradient gets no sum of
    its own, and when the part behind a tile's width is left out.
    """
    monkeypatch.setattr("fsdp_dp.kernels.position_sums_triton._COLUMNS", 32)
    (a, g), (b, h), (_, wide) = factors(3, 9, 24, dtype), factors(3, 9, 24, dtype, seed=1), factors(3, 17, 70, dtype)
    vectors: dict[str, PerSampleGradient] = {
        "first bias": SumOverPositions(wide),
        "scale": SumOverPositions(g, a, 1e-5, True),
        "stays": Materialized(torch.ones(3, 2)),
        "shift": SumOverPositions(g),
        "bias with the same gradient": SumOverPositions(g),
        "other scale": SumOverPositions(h, b, 1e-6, False),
        "a view": SumOverPositions(wide[:, 1:, 3:20]),
    }
    made = stored(vectors)
    assert list(made) == list(vectors) and made["stays"] is vectors["stays"]
    expected = {
        "first bias": wide.double().sum(1),
        "scale": (F.layer_norm(a.double(), (24,), eps=1e-5) * g.double()).sum(1),
        "shift": g.double().sum(1),
        "bias with the same gradient": g.double().sum(1),
        "other scale": (F.rms_norm(b.double(), (24,), eps=1e-6) * h.double()).sum(1),
        "a view": wide[:, 1:, 3:20].double().sum(1),
    }
    for name, value in expected.items():
        assert type(made[name]) is Materialized
        assert off(made[name], value) < 1e-6
    for rows, parts in ((x, made[n].dense()) for n, x in expected.items()):
        assert parts.shape == rows.shape
    in_order = [made[name].dense() for name in vectors if name != "stays"]
    (joint,) = formed(vectors)[1]
    assert list(joint.widths) == [name for name in vectors if name != "stays"]
    torch.testing.assert_close(joint.value_BN, torch.cat(in_order, 1), rtol=0, atol=0)


def test_more_layers_than_a_launch_is_told_of_and_rows_that_were_merged() -> None:
    gradients = {str(n): factors(4, 3, 5 + n, torch.float32)[1] for n in range(position_sums.MOST_LAYERS + 3)}
    made = stored({name: SumOverPositions(g) for name, g in gradients.items()})
    for name, g in gradients.items():
        assert off(made[name], g.double().sum(1)) < 1e-6
        assert off(SumOverPositions(g).regroup(2), g.double().view(2, 6, -1).sum(1)) < 1e-6


def test_a_launch_has_no_more_programs_than_a_grid() -> None:
    """Seen to fail of a norm layer of two columns beside a bias of a large vocabulary."""
    from fsdp_dp.kernels import position_sums_triton

    layers = ((3, 2, True, 1e-5, True, 0, 2), (3, 262_144, False, 0.0, False, -1, 4))
    form = position_sums_triton._form(2, layers, torch.float32)
    *_, height, width = form.constants
    programs = form.programs.rows
    assert len(programs) <= 65535 and height * width <= position_sums_triton._ELEMENTS
    assert {(first, number) for number, _, _, first, *_ in programs if number} == {
        (first, 1) for first in range(0, 262_144, width)
    }


def test_columns_that_stand_side_by_side_by_chance_are_not_taken_for_one_memory() -> None:
    """Seen to fail when columns of another order, another height or another memory are taken along."""
    x, y = torch.arange(24.0).view(3, 8), -torch.arange(24.0).view(3, 8)
    left, middle, right = x.split([3, 2, 3], 1)
    steeper = x.as_strided((3, 2), (5, 1), 3)
    for parts in ([left, middle, right], [middle, left], [left, right], [left, y[:, 3:5]], [left, steeper], [x, x]):
        torch.testing.assert_close(side_by_side(parts), torch.cat(parts, 1), rtol=0, atol=0)
    assert side_by_side([left, middle, right]).data_ptr() == x.data_ptr()


def test_columns_that_are_not_side_by_side_in_memory() -> None:
    """What backward expanded or transposed. Seen to fail, of one tensor alone: kernels read what lies behind it."""
    x, one = torch.arange(24.0).view(3, 8), torch.ones(1, 1)
    wholes = [
        one.expand(3, 5),
        x[:, :1].expand(3, 5),
        x[:, ::2],
        x.t(),
        x.view(3, 2, 4).mT,
        x[:, :1].t(),
        one.expand(3, 1),
    ]
    for whole in wholes:
        for parts in ([whole], [whole, whole[:, :1]]):
            joined = side_by_side(parts)
            assert joined.stride(1) == 1
            torch.testing.assert_close(joined, torch.cat([part.flatten(1) for part in parts], 1), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_nothing_of_a_position_that_is_not_there() -> None:
    """``eps`` of zero, positions that are no multiple of a tile's: 0 / 0 would be NaN."""
    a, g = factors(2, 3, 8, torch.float32)
    assert torch.isfinite(SumOverPositions(g, a, 0.0, False).dense()).all()
