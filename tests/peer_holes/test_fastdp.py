"""FastDP 2.0: where it is wrong or fails, this library is exact, or refuses by name. One test for each hole."""

import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from fsdp_dp import NoEpsilonWarning, PrivacyError, UnsupportedModelError
from tests.agreement import assert_exact, expected_update, loss_of, private_update
from tests.oracle import norm, relative_error
from tests.peer_holes import sharded
from tests.peer_holes.toys import EXACT, ROWS, attached, ids, noise, padding_released, std, subject
from tests.unit.toys import private


def test_fastdp_01_biases_alone() -> None:
    """FastDP 1, exact: bias-only training (BiTFiT) under FSDP; at σ=1000 the raw gradient came back."""
    for backend in ("fsdp1", "fsdp2"):
        assert sharded.training_error(f"biases, {backend}") <= EXACT
        assert abs(sharded.results()[f"noise of biases, {backend}"]["std"] / (1000 * sharded.BOUND) - 1) < 0.15


def test_fastdp_02_linears_directly_in_a_sequential() -> None:
    """FastDP 2, exact: Linears that are children of `nn.Sequential`; they were skipped, gradients raw."""
    assert_exact(subject(lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), input=noise(ROWS, 3)))


def test_fastdp_03_a_seed_does_not_change_the_scale_of_the_noise() -> None:
    """FastDP 3, exact: a flag about seeds decided the noise scale; when it was wrong, √N too little."""
    scales = [sharded.results()[name]["std"] for name in ("noise", "noise, seed")]
    assert all(abs(scale / (sharded.SIGMA * sharded.BOUND) - 1) < 0.05 for scale in scales)


def test_fastdp_04_every_step_is_noised() -> None:
    """FastDP 4, exact: on one path of hooks, noise entered the first step only."""
    model, engine = attached(nn.Linear(30, 40).double(), noise_multiplier=2.0)
    releases = [padding_released(model, engine, noise(2, 30)) for _ in range(4)]
    assert all(abs(std(grads) / 2 - 1) < 0.1 for grads in releases)
    assert not any(torch.equal(a["weight"], b["weight"]) for a, b in itertools.combinations(releases, 2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)
        self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.token(ids)))


def test_fastdp_05_rows_of_tied_models_stay_within_the_bound() -> None:
    """FastDP 5, exact: tied weights; one use's norm overwrote the other's, and a row contributed 1.17·R."""
    tied = subject(Tied, ids=ids())
    assert_exact(tied)
    assert_exact(tied, microbatch=1)


def test_fastdp_06_grouped_convolutions() -> None:
    """FastDP 6, exact: a convolution with groups; its gradients were silently wrong."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(96, 2))

    assert_exact(subject(build, input=noise(ROWS, 4, 4, 4)))


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, input: Tensor) -> Tensor:
        x = self.first(input)
        for _ in range(3):
            x = torch.tanh(self.again(x))
        return x


def test_fastdp_07_module_called_several_times() -> None:
    """FastDP 7, exact: a module used more than once in a forward; it was silently wrong."""
    assert_exact(subject(Reused, input=noise(ROWS, 3)))


class Backwards(nn.Module):
    """Layers registered in another order than they are called in."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.middle = nn.Linear(5, 2), nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, input: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(input)))))


def test_fastdp_08_order_of_registration_does_not_matter() -> None:
    """FastDP 8, exact: flat clipping took the order of registration for the order of backward."""
    assert_exact(subject(Backwards, input=noise(ROWS, 3)))


def test_fastdp_09_batch_norm() -> None:
    """FastDP 9, refused: BatchNorm was accepted although it couples rows."""
    with pytest.raises(UnsupportedModelError, match=r"'1' .*BatchNorm1d mixes the rows of a batch.*replace_batch_norm"):
        attached(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))


def test_fastdp_09_rms_norm() -> None:
    """FastDP 9, exact: RMSNorm was frozen without a word."""
    rms = subject(lambda: nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 2)), input=noise(ROWS, 3))
    assert_exact(rms)
    assert norm({"weight": private_update(rms, bound=1.0)["1.weight"]}) > 0


def test_fastdp_10_step_without_a_backward() -> None:
    """FastDP 10, refused: a step without a backward dropped every parameter for good; here the next step trains as ever."""
    trained = private()
    with pytest.raises(PrivacyError, match=r"optimizer.step\(\) without a backward"):
        trained.step()
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    for x in next(iter(trained.loader())):
        trained.backward(x)
    trained.step()
    assert all(not torch.equal(p, before[name]) for name, p in trained.model.named_parameters())


class Checkpointed(nn.Module):
    """Keeps an eye on a tensor inside the recomputed part."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)
        self.hidden: Any = None

    def part(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        self.hidden = self.hidden or weakref.ref(hidden)
        return self.outer(hidden)

    def forward(self, input: Tensor) -> Tensor:
        return checkpoint(self.part, input, use_reentrant=False)


def test_fastdp_11_checkpointing_frees_activations() -> None:
    """FastDP 11, exact: hooks kept every layer's input alive, so activation checkpointing saved nothing."""
    checkpointed = subject(Checkpointed, input=noise(ROWS, 3))
    assert_exact(checkpointed)
    model, _ = attached(checkpointed.model())
    loss = loss_of(checkpointed, model, checkpointed.batch())
    assert model.hidden() is None
    loss.backward()


def test_fastdp_12_padding_index() -> None:
    """FastDP 12, exact: an Embedding with `padding_idx`; it crashed."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(11, 3, padding_idx=2), nn.Linear(3, 2))

    assert (ids() == 2).any()
    assert_exact(subject(build, input=ids()))


def test_fastdp_13_lengths_that_change() -> None:
    """FastDP 13, exact: the way to a layer's norm was chosen at the first batch's length and kept."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    subjects = [subject(build, input=noise(ROWS, length, 6)) for length in (1, 30, 2)]
    bound = 0.5
    model, engine = attached(subjects[0].model(), max_grad_norm=bound)
    for one in subjects:
        loss_of(one, model, one.batch()).backward()
        engine.privatize()
        found = {n: p.grad * engine.privacy.expected_batch_size for n, p in model.named_parameters()}
        engine.discard()
        assert relative_error(found, expected_update(one, bound)[0]) <= EXACT


def test_fastdp_14_shuffled_rows_get_no_epsilon_of_poisson_sampling() -> None:
    """FastDP 14, refused: a shuffled loader was accounted as if it drew rows independently."""
    model = nn.Linear(3, 2)
    _, engine = attached(model, sampling="poisson", noise_multiplier=1.0)
    (x,) = DataLoader(noise(8, 3).float(), batch_size=8, shuffle=True)
    model(x).square().sum(1).mean().backward()
    with pytest.warns(NoEpsilonWarning, match="No epsilon holds for this run"):
        engine.privatize()
    with pytest.raises(PrivacyError, match="no epsilon holds"):
        engine.epsilon()
