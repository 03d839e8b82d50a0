"""Bounds that follow a quantile: the update, what it costs, and that nothing but noised counts decides it."""

import itertools
import math

import pytest
import torch
from torch import nn

from fsdp_dp import AdaptiveBounds, PrivacyEngine, PrivacyError, make_private
from fsdp_dp.adaptive_bounds import CEILING, next_bounds, split_noise
from tests.distributed.backends import privacy_config, seeded

OPTIONS = AdaptiveBounds(target_quantile=0.6, learning_rate=0.5, budget_fraction=0.04, floor=0.1)


@pytest.mark.parametrize("groups", [1, 7, 100])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 20.0])
def test_both_parts_of_a_release_cost_what_sigma_costs(groups: int, sigma: float) -> None:
    """Gaussian mechanisms compose by squares of sensitivity over noise: R over sigma_g R, sqrt(K)/2 over sigma_b."""
    gradients, counts = split_noise(sigma, groups, OPTIONS)
    assert 1 / gradients**2 + groups / 4 / counts**2 == pytest.approx(1 / sigma**2, rel=1e-12)
    assert split_noise(sigma, groups, None) == (sigma, 0.0)


def test_update() -> None:
    """Ten rows of twenty expected within the bound, four beyond: 3 more than half, so a share of 0.65."""
    (bound,) = next_bounds([2.0], [2.0], [3.0], [0.0], 20, OPTIONS)
    assert bound == pytest.approx(2.0 * math.exp(-0.5 * (0.65 - 0.6)))
    assert next_bounds([0.25], [2.0], [10.0], [1e6], 20, OPTIONS) == (0.2,)
    assert next_bounds([1.0], [1.0], [0.0], [20.0], 20, OPTIONS) < next_bounds([1.0], [1.0], [0.0], [0.0], 20, OPTIONS)


@pytest.mark.parametrize("noise", [-1e5, -1e12, 1e12])
def test_the_wildest_counts_leave_a_bound_that_can_be_trained_with(noise: float) -> None:
    """A walk, and a jump, end at a ceiling or at the floor. Seen to fail (OverflowError) without a ceiling."""
    bounds = (2.0,)
    for _ in range(400):
        bounds = next_bounds(bounds, [2.0], [0.0], [noise], 20, OPTIONS)
    assert bounds == ((0.2,) if noise > 0 else (2.0 * CEILING,))
    assert next_bounds([2.0 * CEILING], [2.0], [0.0], [10.0], 20, OPTIONS) < (2.0 * CEILING,)


def run(steps: int, noise_multiplier: float, scale: float, **changes) -> tuple[list[float], nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    privacy = privacy_config(max_grad_norm=1.0, adaptive_bounds=OPTIONS, noise_multiplier=noise_multiplier, **changes)
    engine = make_private(model, privacy)
    bounds = []
    for _ in range(steps):
        model(torch.randn(8, 4) * scale).square().sum(1).mean().backward()
        engine.privatize()
        bounds.append(engine.max_grad_norm)
        engine._gate.clear()
    return bounds, model


@pytest.mark.parametrize(("scale", "direction"), [(100.0, 1), (1e-3, -1)])
@pytest.mark.parametrize("clipping", ["flat", "layer"])
def test_bounds_move_towards_the_norms_and_stay_above_the_floor(scale: float, direction: int, clipping: str) -> None:
    bounds, _ = run(30, 0.0, scale, clipping=clipping)
    assert all((b - a) * direction >= 0 for a, b in itertools.pairwise(bounds[:8]))
    assert bounds[-1] > 50 if direction > 0 else bounds[-1] == pytest.approx(0.1)


def test_noise_of_the_counts_has_a_key_of_its_own_and_does_not_repeat() -> None:
    """All rows are within the bound all the time, so that noise alone tells steps apart. Seen to fail without the release."""
    bounds, _ = seeded(lambda: run(12, 1.0, 1e-6, seed=3))
    again, _ = seeded(lambda: run(12, 1.0, 1e-6, seed=3))
    moves = [b / a for a, b in itertools.pairwise(bounds) if b > 0.1 + 1e-9]
    assert bounds == again
    assert len(set(moves)) == len(moves) >= 3


def test_padding_rows_are_not_counted() -> None:
    """Seen to fail when masked rows count as beyond the bound."""
    moved = []
    for padding in (0, 6):
        model = nn.Linear(4, 2)
        nn.init.ones_(model.weight)
        engine = make_private(model, privacy_config(max_grad_norm=1.0, adaptive_bounds=OPTIONS, loss_reduction="sum"))
        with engine.microbatch(torch.arange(2 + padding) < 2):
            model(torch.ones(2 + padding, 4)).sum().backward()
        engine.privatize()
        moved.append(engine.max_grad_norm)
    assert moved[0] == moved[1]


def test_a_discarded_batch_leaves_no_count() -> None:
    model = nn.Linear(4, 2)
    engine = make_private(model, privacy_config(max_grad_norm=1.0, adaptive_bounds=OPTIONS))
    model(torch.ones(8, 4)).sum(1).mean().backward()
    engine.discard()
    assert not engine._bounds._excess.any()


def test_a_release_that_fails_at_the_counts_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows counted in it must not be counted again. Seen to fail when the bounds move after the release is over."""
    model = nn.Linear(4, 2)
    engine = make_private(model, privacy_config(max_grad_norm=1.0, adaptive_bounds=OPTIONS))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(8, 4)).sum(1).mean().backward()
    with monkeypatch.context() as broken, pytest.raises(ConnectionError):
        broken.setattr(engine.model, "agree", lambda payload: (_ for _ in ()).throw(ConnectionError()))
        optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(PrivacyError, match="a release failed halfway"):
        optimizer.step()
    optimizer.zero_grad()
    assert not engine._bounds._excess.any()


def chain(widths: int, frozen: int | None = None, **changes) -> PrivacyEngine:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(widths)))
    if frozen is not None:
        model[frozen].requires_grad_(False)
    return make_private(model, privacy_config(max_grad_norm=1.0, clipping="layer", **changes))


@pytest.mark.parametrize(("here", "frozen"), [(3, None), (3, 0), (2, 1)])
def test_bounds_of_another_model_are_refused(here: int, frozen: int | None) -> None:
    """By name: as many groups may be others. Seen to fail when a state's bounds are taken as they are."""
    saved, engine = chain(2, adaptive_bounds=OPTIONS), chain(here, frozen, adaptive_bounds=OPTIONS)
    with pytest.raises(PrivacyError, match=r"bounds of the clipping groups \['0', '1'\], this model has \["):
        engine.load_state_dict(saved.state_dict())
    assert engine.bounds == chain(here, frozen).bounds


def test_fixed_bounds_are_divided_anew_when_other_parameters_train() -> None:
    """As the engine advises to whoever freezes a layer. Seen to fail when the saved division was asked for."""
    saved, engine = chain(3), chain(3, 0)
    saved._releases.number = 5
    engine.load_state_dict(saved.state_dict())
    assert engine.steps == 5
    assert engine.bounds == pytest.approx([math.sqrt(0.5)] * 2)


@pytest.mark.parametrize("bad", [-0.7, 0.0, math.nan, math.inf, "1", True, None])
def test_bounds_that_are_none_are_refused(bad: object) -> None:
    """And the engine stays as it was. Seen to fail for a negative one, under which every row is dropped."""
    engine = chain(2, adaptive_bounds=OPTIONS)
    before, state = (engine.bounds, engine.max_grad_norm, engine._bounds.lattice), engine.state_dict()
    with pytest.raises(PrivacyError, match="load_state_dict: the bound of clipping group '1' is"):
        engine.load_state_dict({**state, "steps": 7, "bounds": {**state["bounds"], "1": bad}})
    assert (engine.bounds, engine.max_grad_norm, engine._bounds.lattice) == before
    assert engine.steps == 0


def test_bounds_without_a_lattice_change_nothing() -> None:
    """Or noise would be made for one bound and rows clipped to another. Seen to fail when they are set one by one."""
    engine = chain(2, adaptive_bounds=OPTIONS)
    before = vars(engine._bounds).copy()
    with pytest.raises(ValueError, match="max_grad_norm: found"):
        engine._bounds.set([1e300, 1e303])
    assert vars(engine._bounds) == before


def test_a_resumed_run_keeps_its_bounds() -> None:
    def attach() -> tuple[nn.Module, object]:
        model = nn.Linear(4, 2)
        return model, make_private(model, privacy_config(max_grad_norm=1.0, adaptive_bounds=OPTIONS))

    model, engine = attach()
    model(torch.ones(8, 4) * 50).sum(1).mean().backward()
    engine.privatize()
    _, other = attach()
    other.load_state_dict(engine.state_dict())
    assert other.bounds == engine.bounds != (1.0,)
    assert other._bounds.lattice == engine._bounds.lattice


def test_other_clip_functions_are_refused() -> None:
    with pytest.raises(ValueError, match="adaptive_bounds needs clip_function='abadi', found 'automatic'"):
        privacy_config(max_grad_norm=1.0, adaptive_bounds=OPTIONS, clip_function="automatic")


@pytest.mark.parametrize("option", ["target_quantile", "budget_fraction", "learning_rate", "floor"])
def test_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"adaptive_bounds.{option} must be a finite number"):
        AdaptiveBounds(**{option: 1.5})
