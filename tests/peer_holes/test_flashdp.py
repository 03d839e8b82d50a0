"""FlashDP (review snapshot): where it is wrong, this library is exact. One test for each hole."""

import math

import pytest
import torch
from torch import nn

from tests.agreement import assert_exact, loss_of
from tests.peer_holes.test_fastdp import Tied
from tests.peer_holes.toys import ROWS, assert_norms, attached, ids, noise, padding_released, std, subject


@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("bound", [0.1, 10.0])
def test_flashdp_01_noise_is_the_multiplier_times_the_bound(bound: float, rows: int) -> None:
    """FlashDP 1, exact: the noise was σ/√B whatever the bound R; it is σR whatever B."""
    model, engine = attached(nn.Linear(30, 40).double(), noise_multiplier=2.0, max_grad_norm=bound)
    assert abs(std(padding_released(model, engine, noise(rows, 30))) / (2 * bound) - 1) < 0.1


def test_flashdp_02_embeddings_and_head_are_private() -> None:
    """FlashDP 2, exact: embeddings and head were trained with raw gradients."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(11, 4), nn.LayerNorm(4), nn.Linear(4, 11))

    assert_exact(subject(build, input=ids()))
    assert_exact(subject(Tied, ids=ids()))
    model, engine = attached(build().double(), noise_multiplier=1.0)
    assert all((g != 0).all() for g in padding_released(model, engine, ids()).values())


@pytest.mark.parametrize("positions", [1, 16])
def test_flashdp_03_norms_of_biases(positions: int) -> None:
    """FlashDP 3, exact: a bias's norm was taken before the sum over positions; 4·R at 16 of them."""
    assert_exact(subject(lambda: nn.Linear(3, 2), input=noise(ROWS, positions, 3)))


def test_flashdp_04_norms_of_used_memory() -> None:
    """FlashDP 4, exact: norms were added to a buffer that nobody had cleared."""
    linear = subject(lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), input=noise(ROWS, 3))
    model, engine = attached(linear.model())
    for _ in range(3):
        for size in range(1, 200):
            torch.full((size,), math.nan, dtype=torch.float64)  # freed at once, for the engine to get
        loss_of(linear, model, linear.batch()).backward()
        assert_norms(engine.per_sample_norms, linear, linear.model())
        engine.discard()


@pytest.mark.parametrize("width", [1, 7, 63, 65])
def test_flashdp_05_sizes_that_are_no_multiple_of_a_block(width: int) -> None:
    """FlashDP 5, exact: kernels read and wrote out of bounds unless sizes were multiples of 64."""
    assert_exact(subject(lambda: nn.Sequential(nn.Linear(width, 5), nn.Linear(5, width)), input=noise(ROWS, 3, width)))


def test_flashdp_06_there_is_an_accountant() -> None:
    """FlashDP 6, exact: no ε was reported at all."""
    model, engine = attached(nn.Linear(3, 2).double(), noise_multiplier=1.0)
    model(noise(ROWS, 3)).square().sum(1).mean().backward()
    engine.privatize()
    assert 0 < engine.epsilon() < math.inf
