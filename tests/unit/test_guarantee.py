"""GUARANTEE.md on one device: rows, sampling, coverage, accounting. `test_guarantee_numerics` has rules 2 to 5.

Every docstring says what was done to a copy of the library to see the test fail. What a user may get wrong has its own
file, `test_bad_input`; here is what must hold in runs where nothing goes wrong, and what nobody may get around.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_dp import BudgetExceededError, PrivacyConfig, PrivacyError, UnsupportedModelError, accounting, make_private
from fsdp_dp.errors import NoEpsilonWarning
from tests.unit.toys import (
    INPUTS,
    ROWS,
    Private,
    Text,
    accumulators,
    assert_trains,
    clipped_sum,
    config,
    flat,
    loss,
    mlp,
    moved,
    nothing_released,
    only_noise,
    private,
    released,
    row_gradients,
    rows,
    tally,
    tally_loss,
    text_loss,
    text_rows,
    times_in_release,
    values,
)

torch.set_num_threads(1)


def many(count: int = 64, **changes: Any) -> Private:
    """A `tally` of 64 rows of which a quarter is drawn on average."""
    options = {"dataset_size": count, "expected_batch_size": count // 4, **changes}
    return private(tally(count), **options)


def tally_loader(subject: Private, **changes: Any) -> Any:
    size = subject.engine.privacy.dataset_size
    return subject.engine.loader(list(torch.eye(size).double()), **{"microbatch_size": 5, "steps": 4, **changes})


# ------------------------------------------------------------------------------------------------ 1: once per release


def test_rule_01_each_drawn_row_is_in_its_own_release_once_and_in_no_other() -> None:
    """Seen to fail when the accumulators are not cleared at a release."""
    subject = many()
    for logical_batch in tally_loader(subject):
        drawn = torch.zeros(64, dtype=torch.float64)
        for x in logical_batch:
            drawn += x.sum(0)
            tally_loss(subject.model, x).backward()
        assert drawn.max() <= 1
        torch.testing.assert_close(times_in_release(subject), drawn, rtol=1e-9, atol=1e-9)
    assert subject.engine.steps == 4


def test_rule_01_second_backward_raises() -> None:
    """Seen to fail when `_enter_backward` does not look at `done`: the rows count twice."""
    subject = private(tally(ROWS))
    value = tally_loss(subject.model, torch.eye(ROWS).double())
    value.backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="second backward"):
        value.backward()
    assert max(accumulators(subject.engine)[0].abs()) <= 1


def test_rule_01_retried_microbatch_raises() -> None:
    """Seen to fail when a forward within a logical batch needs no microbatch of the loader."""
    subject = many()
    x = next(next(iter(tally_loader(subject))))
    tally_loss(subject.model, x).backward()
    with pytest.raises(PrivacyError):
        tally_loss(subject.model, x).backward()
    assert max(accumulators(subject.engine)[0].abs()) <= 1


def test_rule_01_logical_batch_over_pending_sums_raises() -> None:
    """Seen to fail when `_start_logical_batch` does not look at what is pending: two draws become one release."""
    subject = many()
    batches = iter(tally_loader(subject))
    for x in next(batches):
        tally_loss(subject.model, x).backward()
    with nothing_released(subject), pytest.raises(PrivacyError, match="not released"):
        next(batches)


def test_rule_01_exception_poisons_until_discarded() -> None:
    """Seen to fail when the forward hook does not set `_poisoned` on an exception."""
    subject = many()
    for number, x in enumerate(next(iter(tally_loader(subject, microbatch_size=2)))):
        if number == 1:
            with pytest.raises(RuntimeError, match="shapes"):
                subject.model(x[:, 1:])
        elif number == 0:
            tally_loss(subject.model, x).backward()
    with nothing_released(subject), pytest.raises(PrivacyError, match=r"Nothing was released"):
        subject.optimizer.step()
    subject.engine.discard()
    assert not accumulators(subject.engine)[0].any()


@pytest.mark.parametrize("how", ["discard", "optimizer.zero_grad", "model.zero_grad"])
def test_rule_01_discarded_rows_are_in_no_release(how: str) -> None:
    """Seen to fail when `discard` leaves the accumulators as they are."""
    subject = many()
    batches = iter(tally_loader(subject))
    for x in next(batches):
        tally_loss(subject.model, x).backward()
    {
        "discard": subject.engine.discard,
        "optimizer.zero_grad": subject.optimizer.zero_grad,
        "model.zero_grad": subject.model.zero_grad,
    }[how]()
    drawn = torch.zeros(64, dtype=torch.float64)
    for x in next(batches):
        drawn += x.sum(0)
        tally_loss(subject.model, x).backward()
    torch.testing.assert_close(times_in_release(subject), drawn, rtol=1e-9, atol=1e-9)
    assert subject.engine.steps == 1


def test_rule_01_first_step_releases_everything_once_for_all_optimizers() -> None:
    """Seen to fail when every optimizer's step releases, or when one's step consumes another's gradients."""
    subject = private(noise_multiplier=1.0)
    matrices, vectors = ([p for p in subject.model.parameters() if p.ndim == n] for n in (2, 1))
    subject.backward(rows())
    torch.optim.SGD(matrices, lr=1.0).step()
    assert subject.engine.steps == 1
    grads = [p.grad.clone() for p in vectors if p.grad is not None]
    assert len(grads) == len(vectors)
    assert all(p.grad is None for p in matrices)
    before = [p.detach().clone() for p in vectors]
    torch.optim.SGD(vectors, lr=1.0).step()
    assert subject.engine.steps == 1
    assert all(torch.equal(b - g, p) for b, g, p in zip(before, grads, vectors, strict=True))
    assert all(p.grad is None for p in vectors)


# ------------------------------------------------------------------------------------------- 6: every element, always


class Branches(nn.Module):
    """Has layers that a forward may leave out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(INPUTS, 64), nn.Linear(INPUTS, 64)
        self.table, self.norm = nn.Embedding(16, 64), nn.LayerNorm(64)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_rule_06_parameters_without_a_gradient_get_their_noise() -> None:
    """Seen to fail when only parameters that a tap reported are released."""
    subject = private(Branches(), noise_multiplier=2.0, max_grad_norm=0.5)
    subject.backward(rows())
    subject.engine.privatize()
    for name, p in subject.model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.all(), name
        if not name.startswith("used"):
            assert float(p.grad.std()) * ROWS == pytest.approx(1.0, rel=5 / math.sqrt(2 * p.numel())), name


def test_rule_06_empty_draw_releases_noise_everywhere() -> None:
    """Seen to fail when a microbatch without a real row is not taken for a part of the logical batch."""
    noise = only_noise(private(Branches(), noise_multiplier=2.0, max_grad_norm=0.5))
    assert noise.all()
    assert float(noise.std()) == pytest.approx(1.0, rel=5 / math.sqrt(2 * noise.numel()))


def test_rule_06_an_empty_poisson_draw_is_a_release_like_any_other() -> None:
    """Seen to fail when the loader hands out no microbatch for an empty draw."""
    subject = many(8, expected_batch_size=1, noise_multiplier=1.0)
    for logical_batch in tally_loader(subject, steps=12):
        for x in logical_batch:
            tally_loss(subject.model, x).backward()
        assert times_in_release(subject).all()
    assert subject.engine.steps == 12


def test_rule_06_frozen_parameters_get_none() -> None:
    """Seen to fail when the engine also manages parameters that were frozen at attachment."""
    model = mlp()
    model[0].requires_grad_(False)
    subject = private(model, noise_multiplier=1.0)
    before = values(model)
    subject.backward(rows())
    subject.step()
    change = moved(model, before)
    assert not change["0.weight"].any() and not change["0.bias"].any()
    assert change["2.weight"].all() and change["2.bias"].all()


# ---------------------------------------------------------------------------------------- 7: sampling as accounted for


def test_rule_07_padding_is_masked_although_it_has_a_gradient() -> None:
    """Each row, and a padding row as well, would move the bias by 1. Seen to fail when the mask is ignored."""
    subject = private(nn.Linear(64, 1).double(), dataset_size=64, expected_batch_size=16, max_grad_norm=2.0)
    for logical_batch in tally_loader(subject, microbatch_size=7):
        drawn = 0.0
        for x in logical_batch:
            drawn += float(x.sum())
            tally_loss(subject.model, x).backward()
        assert float(times_in_release(subject)[-1]) == pytest.approx(drawn)


def test_rule_07_rows_are_drawn_independently_at_the_accounted_rate() -> None:
    """Seen to fail when draws are made with twice the rate, and when every draw repeats the first."""
    subject = many(64)
    counts = []
    for logical_batch in tally_loader(subject, microbatch_size=64, steps=100):
        for x in logical_batch:
            counts.append(x.sum(0))
            tally_loss(subject.model, x).backward()
        subject.step()
    drawn = torch.stack(counts)
    assert float(drawn.mean()) == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / drawn.numel()))
    sizes = drawn.sum(1)
    assert 0.5 < float(sizes.var()) / (64 * 0.25 * 0.75) < 1.7
    assert len({tuple(row.tolist()) for row in drawn}) == len(drawn)


def test_rule_07_two_loaders_draw_differently() -> None:
    """Seen to fail when all loaders of an engine have one key."""
    subject = many()
    draws = [torch.cat(list(next(iter(tally_loader(subject))))).sum(0) for _ in range(2)]
    assert not torch.equal(*draws)


def test_rule_07_epsilon_needs_the_loader_or_the_users_word() -> None:
    """Seen to fail when `_vouched` is not taken back by a microbatch from elsewhere."""
    subject = private(noise_multiplier=1.0)
    for logical_batch in subject.loader():
        for x in logical_batch:
            subject.backward(x)
        subject.step()
    assert subject.engine.epsilon() < 100
    subject.backward(rows())
    subject.step()
    with pytest.raises(PrivacyError, match=r"engine.loader.*external_poisson"):
        subject.engine.epsilon()
    resumed = private(noise_multiplier=1.0)
    resumed.engine.load_state_dict(subject.engine.state_dict())
    with pytest.raises(PrivacyError, match=r"engine.loader"):
        resumed.engine.epsilon()

    external = private(noise_multiplier=1.0, sampling="external_poisson")
    external.backward(rows())
    external.step()
    assert external.engine.epsilon() < 100


def test_rule_07_mask_does_not_vouch_for_the_draw() -> None:
    """Seen to fail when `microbatch(mask)` counts as the engine's own loader."""
    subject = private(noise_multiplier=1.0)
    with subject.engine.microbatch(torch.ones(ROWS, dtype=torch.bool)):
        subject.backward(rows())
    subject.step()
    with pytest.raises(PrivacyError, match=r"engine.loader"):
        subject.engine.epsilon()


def shuffling(**changes: Any) -> Private:
    """Epochs of four logical batches of two rows."""
    return many(8, sampling="shuffle", expected_batch_size=2, noise_multiplier=1.0, **changes)


def release_all(subject: Private, loader: Any) -> None:
    for logical_batch in loader:
        for x in logical_batch:
            tally_loss(subject.model, x).backward()
        subject.step()


def of_releases(count: int) -> float:
    return accounting.epsilon(noise_multiplier=1.0, sample_rate=1.0, steps=count, delta=1e-3).upper


def test_rule_07_shuffled_epochs_hold_each_row_once_and_are_not_amplified() -> None:
    """Seen to fail when shuffling is accounted with the sample rate."""
    subject = shuffling()
    seen = torch.zeros(8, dtype=torch.float64)
    for number, logical_batch in enumerate(tally_loader(subject, microbatch_size=2, steps=8)):
        for x in logical_batch:
            seen += x.sum(0)
            tally_loss(subject.model, x).backward()
        subject.step()
        assert seen.max() <= number // 4 + 1
        assert subject.engine.epsilon() == pytest.approx(of_releases(number // 4 + 1), rel=1e-6)


def test_rule_07_shuffling_counts_the_epochs_that_a_row_can_be_in() -> None:
    """Half an epoch of each of two loaders may hold a row twice. Seen to fail when releases are counted, not epochs."""
    subject = shuffling()
    for _ in range(2):
        release_all(subject, tally_loader(subject, steps=2))
    assert subject.engine.epsilon() >= of_releases(2) * (1 - 1e-6)


def test_rule_07_shuffling_counts_a_resumed_epoch_anew() -> None:
    """The resumed run has a fresh permutation. Seen to fail when releases are counted, not epochs."""
    first, second = shuffling(), shuffling()
    release_all(first, tally_loader(first, steps=2))
    second.engine.load_state_dict(first.engine.state_dict())
    release_all(second, tally_loader(second, steps=2))
    assert second.engine.epsilon() >= of_releases(2) * (1 - 1e-6)


def test_rule_07_shuffling_counts_epochs_of_which_batches_were_discarded() -> None:
    """One release out of each of two epochs. Seen to fail when releases are counted, not epochs."""
    subject = shuffling()
    for number, logical_batch in enumerate(tally_loader(subject, steps=8)):
        for x in logical_batch:
            tally_loss(subject.model, x).backward()
        subject.step() if number in (0, 7) else subject.engine.discard()
    assert subject.engine.steps == 2
    assert subject.engine.epsilon() >= of_releases(2) * (1 - 1e-6)


# ----------------------------------------------------------------------------------------------- 9: nothing goes around


def test_rule_09_no_gradient_but_a_released_one_is_ever_seen() -> None:
    """Seen to fail when the freeze window stays open: autograd then writes ``.grad``."""
    subject = private(noise_multiplier=1.0)

    def none_there() -> bool:
        return all(p.grad is None for p in subject.model.parameters())

    for _ in range(2):
        subject.backward(rows())
        assert none_there()
    with pytest.raises(RuntimeError, match="shapes"):
        subject.backward(rows()[:, 1:])
    assert none_there()
    subject.engine.discard()
    assert none_there()
    subject.backward(rows())
    subject.optimizer.step()
    assert none_there()


def test_rule_09_gradient_of_foreign_origin_raises() -> None:
    """Seen to fail when the step pre-hook does not compare ``.grad`` with what was released."""
    subject = private()
    subject.backward(rows())
    before = values(subject.model)
    for p in subject.model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(PrivacyError, match="did not release"):
        subject.optimizer.step()
    assert not flat(moved(subject.model, before)).any()


def test_rule_09_optimizer_with_a_stranger_raises() -> None:
    """Seen to fail when `adopt` does not look for parameters that nobody clips."""
    model = mlp()
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(2))], lr=1.0)
    with pytest.raises(PrivacyError, match="not manage"):
        make_private(model, config(), optimizer)


@pytest.mark.parametrize("read", [True, False], ids=["read from its layer", "kept elsewhere"])
def test_rule_09_use_behind_a_layers_back(read: bool) -> None:
    """That part of the gradient is found, or the program refused. Seen to fail when the first forward is not watched: the
    step then releases without that part."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lin = nn.Linear(INPUTS, INPUTS).double()

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.lin(x), self.lin.weight if read else self.lin._parameters["weight"])

    model = Functional()
    expected = clipped_sum(row_gradients(model, loss, rows()))
    subject = private(model, sampling="external_poisson")
    if read:
        subject.backward(rows())
        torch.testing.assert_close(released(subject), expected)
        return
    with nothing_released(subject), pytest.raises(UnsupportedModelError, match=r"'lin.weight'"):
        subject.backward(rows())


def test_rule_09_weight_penalty_raises() -> None:
    """Seen to fail when the window stays closed between forward and backward: the penalty is then silently dropped."""
    subject = private()
    with pytest.raises(UnsupportedModelError, match=r"weight penalty"):
        (loss(subject.model, rows()) + sum(p.square().sum() for p in subject.model.parameters())).backward()
    with nothing_released(subject), pytest.raises(PrivacyError):
        subject.optimizer.step()


def test_rule_09_buffer_written_from_data_raises() -> None:
    """Seen to fail when buffers are not compared after the first forward."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(INPUTS, INPUTS).double()
            self.register_buffer("seen", torch.zeros(INPUTS).double())

        def forward(self, x: Tensor) -> Tensor:
            self.seen += x.sum(0)
            return self.lin(x)

    with pytest.raises(UnsupportedModelError, match=r"Buffer 'seen'"):
        private(Counting()).backward(rows())


def test_rule_09_frozen_batch_norm_leaves_its_buffers_alone() -> None:
    """Seen to fail when batch norm in training mode is accepted at attachment."""
    model = nn.Sequential(nn.Linear(INPUTS, 4), nn.BatchNorm1d(4).requires_grad_(False), nn.Linear(4, 2)).double()
    with pytest.raises(UnsupportedModelError, match=r"'1'.*BatchNorm1d"):
        private(model)
    model[1].eval()
    subject = private(model)
    before = {name: b.clone() for name, b in model.named_buffers()}
    subject.backward(rows())
    subject.step()
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


# --------------------------------------------------------------------------------------------------- 10: accounting


def test_rule_10_noise_is_calibrated_for_the_whole_budget_and_epsilon_stays_below_it() -> None:
    """Seen to fail when noise is calibrated for one release instead of all of them."""
    subject = private(target_epsilon=3.0, steps=4)
    calibrated = accounting.calibrate_noise_multiplier(target_epsilon=3.0, sample_rate=1.0, steps=4, delta=1e-3)
    assert subject.engine.noise_multiplier == calibrated
    spent = []
    for logical_batch in subject.loader(steps=None):
        for x in logical_batch:
            subject.backward(x)
        subject.step()
        spent.append(subject.engine.epsilon())
    assert len(spent) == 4
    assert all(earlier < later for earlier, later in itertools.pairwise(spent))
    assert 2.9 < spent[-1] <= 3.0


def test_rule_10_epsilon_is_the_accountants_upper_bound() -> None:
    """Seen to fail when `epsilon` returns the estimate."""
    subject = private(noise_multiplier=1.0)
    release_all_rows(subject)
    bounds = accounting.epsilon(noise_multiplier=1.0, sample_rate=1.0, steps=2, delta=1e-3)
    assert subject.engine.epsilon() == bounds.upper
    assert subject.engine.epsilon(delta=1e-6) > subject.engine.epsilon() > subject.engine.epsilon(delta=1e-2)


def release_all_rows(subject: Private) -> None:
    for logical_batch in subject.loader():
        for x in logical_batch:
            subject.backward(x)
        subject.step()


def test_rule_10_release_after_the_budget_raises_and_releases_nothing() -> None:
    """Seen to fail when the number of releases is not compared with the budget's."""
    subject = private(target_epsilon=8.0, steps=3)
    for _ in range(3):
        subject.backward(rows())
        subject.step()
    for _ in range(2):
        subject.backward(rows())
        with nothing_released(subject), pytest.raises(BudgetExceededError, match="fixed at 3 releases"):
            subject.optimizer.step()


def test_rule_10_budget_counts_releases_before_a_load() -> None:
    """Seen to fail when `load_state_dict` does not take the number of releases over."""
    first, second = private(target_epsilon=8.0, steps=2), private(target_epsilon=8.0, steps=2)
    first.backward(rows())
    first.step()
    second.engine.load_state_dict(first.engine.state_dict())
    assert second.engine.steps == 1
    second.backward(rows())
    second.step()
    second.backward(rows())
    with nothing_released(second), pytest.raises(BudgetExceededError):
        second.optimizer.step()


def test_rule_10_every_release_is_counted_however_it_is_made() -> None:
    """By a step, by `privatize`, dropped by `zero_grad`, or failed halfway. Seen to fail when `steps` grows last."""
    subject = private(noise_multiplier=1.0)
    subject.backward(rows())
    subject.step()
    subject.backward(rows())
    subject.engine.privatize()
    subject.step()
    assert subject.engine.steps == 2
    subject.backward(rows())
    subject.engine.privatize()
    subject.optimizer.zero_grad()
    assert subject.engine.steps == 3
    subject.backward(rows())
    accumulators(subject.engine)[-1].fill_(math.nan)
    with pytest.raises(FloatingPointError, match="Nothing was released"):
        subject.optimizer.step()
    assert subject.engine.steps == 4
    subject.engine.discard()
    assert all(p.grad is None for p in subject.model.parameters())
    subject.backward(rows())
    subject.step()
    assert subject.engine.steps == 5


def test_rule_10_older_state_does_not_take_releases_back() -> None:
    """Seen to fail when `load_state_dict` assigns the number of releases instead of keeping the larger."""
    subject = private(noise_multiplier=1.0)
    old = subject.engine.state_dict()
    release_all_rows(subject)
    spent = subject.engine.epsilon()
    subject.engine.load_state_dict(old)
    assert subject.engine.steps == 2
    assert subject.engine.epsilon() == spent


def test_rule_10_what_is_accounted_cannot_be_set_afterwards() -> None:
    """Seen to fail when both were plain attributes: epsilon was that of noise which nobody added."""
    engine = private(noise_multiplier=1.0, sampling="external_poisson").engine
    for name, value in {
        "privacy": dataclasses.replace(engine.privacy, expected_batch_size=1),
        "noise_multiplier": 9.0,
    }.items():
        with pytest.raises(AttributeError, match=name):
            setattr(engine, name, value)


def test_rule_10_epsilon_is_infinite_without_noise_and_only_then() -> None:
    """Seen to fail when sigma = 0 is accounted as a tiny sigma."""
    silent, noisy = private(noise_multiplier=0.0), private(noise_multiplier=0.2)
    for subject in (silent, noisy):
        release_all_rows(subject)
    assert silent.engine.epsilon() == math.inf
    assert "epsilon is infinite" in silent.engine.summary()
    assert 10 < noisy.engine.epsilon() < math.inf


def test_rule_10_fixed_seed_is_said_wherever_epsilon_is() -> None:
    """Seen to fail when `epsilon` does not warn under a seed."""
    with pytest.warns(UserWarning, match="seed fixed: no privacy guarantee"):
        subject = private(seed=7, noise_multiplier=1.0)
    release_all_rows(subject)
    with pytest.warns(UserWarning, match="seed fixed: no privacy guarantee"):
        assert subject.engine.epsilon() < 100
    assert "seed fixed: no privacy guarantee" in subject.engine.summary()


def test_rule_10_loader_ends_with_the_budget_of_a_resumed_run() -> None:
    """Seen to fail: it yielded all of `steps` again, so the run died at its end, before the last checkpoint was saved."""
    first, second = private(target_epsilon=8.0, steps=3), private(target_epsilon=8.0, steps=3)
    first.backward(rows())
    first.step()
    second.engine.load_state_dict(first.engine.state_dict())
    assert len(second.loader(steps=None)) == 2
    for logical_batch in second.loader(steps=None):
        for x in logical_batch:
            second.backward(x)
        second.step()
    assert second.engine.steps == 3
    third = private(target_epsilon=8.0, steps=3)
    third.engine.load_state_dict(second.engine.state_dict())
    assert list(third.loader(steps=None)) == []
    with pytest.raises(BudgetExceededError):  # whoever goes on within one session is told
        for logical_batch in second.loader(steps=None):
            for x in logical_batch:
                second.backward(x)
            second.step()


def test_rule_10_releases_of_a_detached_engine_are_counted_on_or_said_to_be_left_out() -> None:
    """Seen to fail: a second engine on the same model began at nothing, and told of a smaller epsilon."""
    first = private(sampling="external_poisson", noise_multiplier=1.0)
    first.backward(rows())
    first.step()
    state, alone = first.engine.state_dict(), first.engine.epsilon()
    first.engine.detach()
    second = private(first.model, sampling="external_poisson", noise_multiplier=1.0)
    second.backward(rows())
    second.step()
    with pytest.warns(NoEpsilonWarning, match="epsilon leaves out 1 releases of an engine that was detached"):
        assert second.engine.epsilon() == alone
    second.engine.detach()
    third = private(first.model, sampling="external_poisson", noise_multiplier=1.0)
    third.engine.load_state_dict(state)  # of one of the two
    with pytest.warns(NoEpsilonWarning, match="leaves out 2 releases"):
        third.engine.epsilon()
    third.engine.load_state_dict(state | {"steps": 2})
    assert third.engine.epsilon() > alone


def test_rule_10_seeded_releases_stay_seeded_after_a_load() -> None:
    """Their noise can be computed by anyone who knows the seed. Seen to fail when the state does not say it."""
    with pytest.warns(UserWarning, match="seed fixed"):
        seeded = private(seed=7, noise_multiplier=1.0)
    release_all_rows(seeded)
    resumed = private(noise_multiplier=1.0)
    resumed.engine.load_state_dict(seeded.engine.state_dict())
    with pytest.warns(UserWarning, match="seed fixed: no privacy guarantee"):
        resumed.engine.epsilon()
    assert "seed fixed" in resumed.engine.summary()


def test_rule_10_budget_under_shuffling_is_one_of_epochs() -> None:
    """Four releases fit into the epoch that noise was calibrated for, not into one and a half of two loaders.

    Seen to fail when releases are compared with the budget, and epochs are not.
    """
    subject = many(8, sampling="shuffle", expected_batch_size=2, target_epsilon=3.0, steps=4)
    release_all(subject, tally_loader(subject, steps=2))
    assert subject.engine.epsilon() <= 3.0
    with pytest.raises(BudgetExceededError):
        release_all(subject, tally_loader(subject, steps=2))
    assert subject.engine.steps == 2
    assert subject.engine.epsilon() <= 3.0


# ------------------------------------------------------------------------------------------------- 11: non-finite rows


@pytest.mark.parametrize("numerics", ["certified", "nominal"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rule_11_non_finite_rows_contribute_zero_through_every_layer(bad: float, numerics: str) -> None:
    """Seen to fail when dropped rows are multiplied by zero instead of deselected, and when NaN norms pass `min`."""
    subject = private(Text(), numerics=numerics)
    x = text_rows()
    x[[2, 5], 0] = bad
    text_loss(subject.model, x).backward()
    assert int(subject.engine.nonfinite_rows) == 2
    good = [row for row in range(ROWS) if row not in (2, 5)]
    expected = clipped_sum(row_gradients(Text(), text_loss, x[good]))
    torch.testing.assert_close(released(subject), expected, rtol=1e-8, atol=1e-10)


def test_rule_11_padding_may_hold_anything() -> None:
    """Seen to fail when masked rows are multiplied by zero instead of deselected."""
    subject = private(Text())
    x = text_rows()
    x[6:, 0] = math.nan
    with subject.engine.microbatch(torch.arange(ROWS) < 6):
        text_loss(subject.model, x).backward()
    assert int(subject.engine.nonfinite_rows) == 0
    expected = clipped_sum(row_gradients(Text(), text_loss, x[:6]))
    torch.testing.assert_close(released(subject), expected, rtol=1e-8, atol=1e-10)


def test_rule_11_norm_that_overflows_is_bounded_all_the_same() -> None:
    """Squares of 1e30 overflow float32. Seen to fail when an infinite norm is taken for none."""
    subject = private(mlp(torch.float32), loss_reduction="sum")
    x = rows(dtype=torch.float32)
    scale = torch.ones(ROWS, 1)
    scale[3] = 1e30
    (subject.model(x) * scale).sum().backward()
    total = torch.cat(accumulators(subject.engine))
    assert total.isfinite().all()
    assert float(total.double().norm()) <= ROWS


# ------------------------------------------------------------------------------------------------------- 13: groups


def test_rule_13_flat_bound_is_on_the_norm_over_all_parameters() -> None:
    """Seen to fail when each parameter is clipped by its own norm: the total is then R * sqrt(parameters)."""
    x = text_rows(scales=torch.full((ROWS,), 100.0).double())
    for row in x:
        subject = private(Text(), max_grad_norm=0.3)
        text_loss(subject.model, row[None]).backward()
        total = released(subject)
        assert 0.3 * (1 - 1e-6) < float(total.norm()) <= 0.3
        expected = clipped_sum(row_gradients(Text(), text_loss, row[None]), 0.3)
        torch.testing.assert_close(total, expected, rtol=1e-8, atol=1e-10)


def test_rule_13_noise_is_isotropic() -> None:
    """Seen to fail when every second parameter gets half the noise."""
    model = nn.Sequential(nn.Linear(3, 400), nn.LayerNorm(400), nn.Linear(400, 2)).double()
    subject = private(model, noise_multiplier=3.0, max_grad_norm=0.2)
    with subject.engine.microbatch(torch.zeros(2, dtype=torch.bool)):
        subject.backward(rows(2))
    subject.engine.privatize()
    for name, p in model.named_parameters():
        assert p.grad is not None
        if p.numel() >= 400:
            std = float(p.grad.std()) * ROWS
            assert std == pytest.approx(3.0 * 0.2, rel=5 / math.sqrt(2 * p.numel())), name


def test_rule_13_other_groups_are_refused_until_they_exist() -> None:
    """Seen to fail when `clipping` is not validated."""
    with pytest.raises(ValueError, match="clipping"):
        config(clipping="per_layer_without_a_bound")
    assert PrivacyConfig.__dataclass_fields__["clipping"].default == "flat"


def test_an_untroubled_run_is_the_oracles() -> None:
    """What all of the above perturb: without trouble, the update is that of the per-sample loop."""
    assert_trains(private())
