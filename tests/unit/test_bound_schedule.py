"""A bound that the program sets between releases: rows are clipped to it, noise is sigma times it, the guard asks for it."""

import re

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from fsdp_dp import AdaptiveBounds, PrivacyEngine, PrivacyError, make_private
from tests.distributed.backends import EXPECTED_BATCH_SIZE, TOLERANCE, privacy_config
from tests.distributed.harness import RankFailure, run
from tests.oracle import CASES, Groups, is_listed, median_norm, relative_error, row_gradients, trainable


@pytest.mark.parametrize("clipping", ["flat", "layer"])
def test_rows_are_clipped_to_the_bound_of_their_release(clipping: str) -> None:
    """Seen to fail where the sums took the first bound, and where groups got the whole of the new one."""
    case = CASES["decoder"]
    model, (inputs, targets) = case.model(), case.batch()
    first, groups = median_norm("decoder"), Groups(clipping=clipping)
    engine = make_private(model, privacy_config(max_grad_norm=first, clipping=clipping))
    members = groups.members(model, is_listed)
    numel = {n: p.numel() for n, p in trainable(model).items()}
    for bound in (first, first / 3, first * 1.7):
        engine.set_max_grad_norm(bound)
        assert engine.max_grad_norm == pytest.approx(bound, rel=1e-14)
        with engine.microbatch(torch.ones(len(inputs), dtype=torch.bool)):
            case.row_losses(model(inputs), targets).mean().backward()
        engine.privatize()
        found = {n: p.grad.clone() * EXPECTED_BATCH_SIZE for n, p in trainable(model).items() if p.grad is not None}
        engine.discard()
        rows = row_gradients(case.model(), (inputs, targets), case.row_losses)
        assert relative_error(found, groups.clipped_sum(rows, members, bound, numel)) < TOLERANCE


def wide(noise_multiplier: float = 2.0, **changes: object) -> tuple[nn.Module, PrivacyEngine]:
    model = nn.Linear(200, 100, bias=False)
    return model, make_private(model, privacy_config(max_grad_norm=1.0, noise_multiplier=noise_multiplier, **changes))


def released(model: nn.Module, engine: PrivacyEngine) -> torch.Tensor:
    """The sum as it was released, of rows without a gradient."""
    (model(torch.zeros(4, 200)) ** 2).mean(1).mean().backward()
    engine.privatize()
    gradient = model.weight.grad
    assert isinstance(gradient, torch.Tensor)
    found = gradient.clone() * EXPECTED_BATCH_SIZE
    engine.discard()
    return found


def test_noise_is_that_of_the_bound_that_was_set() -> None:
    """And epsilon is that of the noise multiplier. Seen to fail where the lattice and its noise kept the first bound."""
    model, engine = wide()
    found = {}
    for bound in (1.0, 8.0, 0.25):
        engine.set_max_grad_norm(bound)
        found[bound] = float(released(model, engine).std()) / bound
    assert list(found.values()) == pytest.approx([2.0] * 3, rel=0.03)
    other_model, other = wide()
    for _ in range(3):
        released(other_model, other)
    assert engine.epsilon() == other.epsilon()


def test_less_noise_than_that_is_refused() -> None:
    """By the guard, which was told of the bound by itself. Seen to fail where it asked for the first one only."""
    model, engine = wide()
    engine.set_max_grad_norm(8.0)
    engine._bounds.set([1.0])
    with pytest.raises(PrivacyError, match="less noise than is accounted for"):
        released(model, engine)


def test_what_is_refused_changes_nothing() -> None:
    model, engine = wide()
    for wrong in (0.0, -1.0, float("inf"), float("nan"), "2"):
        with pytest.raises(ValueError, match="max_grad_norm must be"):
            engine.set_max_grad_norm(wrong)  # type: ignore[arg-type]
    (model(torch.zeros(4, 200)) ** 2).mean(1).mean().backward()
    with pytest.raises(PrivacyError, match="within a logical batch"):
        engine.set_max_grad_norm(2.0)
    assert engine.max_grad_norm == engine.guard.asked_bound == 1.0
    _, adaptive = wide(adaptive_bounds=AdaptiveBounds())
    with pytest.raises(PrivacyError, match="adaptive_bounds move the bounds by themselves"):
        adaptive.set_max_grad_norm(2.0)


class AsksWithinBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)
        self.ask = lambda: None

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        h_BP = self.first(x_BD)
        h_BP.register_hook(lambda grad: self.ask())
        return self.second(h_BP)


@pytest.mark.parametrize("clipping", ["flat", "layer"])
def test_a_backward_that_runs_keeps_its_bound(clipping: str) -> None:
    """Seen to fail: the groups before were clipped to the old bound, and noised as for the new one."""
    model = AsksWithinBackward()
    engine = make_private(model, privacy_config(max_grad_norm=1.0, clipping=clipping))
    model.ask = lambda: engine.set_max_grad_norm(0.01)
    with pytest.raises(PrivacyError, match="within a logical batch"):
        model(torch.randn(4, 4)).square().mean().backward()
    engine.discard()
    model.ask = lambda: None
    engine.set_max_grad_norm(2.0)
    model(torch.randn(4, 4)).square().mean().backward()
    engine.privatize()


def differ(rank: int, world_size: int) -> None:
    engine = make_private(fully_shard(nn.Linear(4, 2)), privacy_config(max_grad_norm=1.0))
    engine.set_max_grad_norm(1.0 + rank)


def test_ranks_must_agree() -> None:
    said = re.escape("engine.set_max_grad_norm: max_grad_norm is 1.0 on rank 0 and 2.0 on rank 1")
    with pytest.raises(RankFailure, match=said):
        run(differ, 2)
