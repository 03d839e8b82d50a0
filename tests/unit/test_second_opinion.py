"""Two accountants agree, a contradiction is loud, and cut draws cost what dp-accounting's own accountant says."""

import dataclasses

import pytest
from dp_accounting import dp_event
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation

from fsdp_dp.accounting import AccountingError, Cap, EpsilonBounds, calibrate_for, epsilon, epsilon_for
from fsdp_dp.config import PrivacyConfig
from fsdp_dp.second_opinion import compared, cost_of_cap, cross_check

PRIVACY = PrivacyConfig(
    max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=10, dataset_size=1000, target_delta=1e-5, steps=100
)


@pytest.mark.parametrize(("sigma", "batch", "steps"), [(0.5, 10, 1), (0.7, 10, 50), (1.0, 100, 100)])
def test_prv_and_pld_agree(sigma: float, batch: int, steps: int) -> None:
    privacy = dataclasses.replace(PRIVACY, expected_batch_size=batch)
    assert cross_check(privacy, sigma, steps).startswith("epsilon cross-checked: prv")


@pytest.mark.parametrize(
    ("sigma", "steps", "delta"), [(1.0, 4, 1e-6), (1.0, 3000, 1e-9), (3.0, 1, 1e-9), (1.0, 30, 1e-9)]
)
def test_small_epsilons_raise_no_false_alarm(sigma: float, steps: int, delta: float) -> None:
    """Seen to fail for all four: cells as wide as the Renyi bound allows put "pld" at up to four times epsilon."""
    privacy = dataclasses.replace(PRIVACY, expected_batch_size=64, dataset_size=300_000, target_delta=delta)
    assert cross_check(privacy, sigma, steps).startswith("epsilon cross-checked: prv")


@pytest.mark.parametrize(
    ("prv", "pld"),
    [((1.9, 1.91, 1.92), (0.0, 1.88, 1.89)), ((1.9, 1.91, 1.92), (0.0, 1.97, 1.98))],
)
def test_a_contradiction_is_loud(prv: tuple[float, float, float], pld: tuple[float, float, float]) -> None:
    """Below what the other knows for certain, and further above it than it may be."""
    with pytest.raises(AccountingError, match=r"contradict each other: 'prv' puts epsilon between 1\.9 and 1\.92"):
        compared(EpsilonBounds(*prv), EpsilonBounds(*pld))


def test_a_wrong_accountant_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes the noise for 3 % more than it is."""
    original = epsilon

    def wrong(*, noise_multiplier: float, accountant: str, **options: float) -> EpsilonBounds:
        error = 1.03 if accountant == "pld" else 1.0
        return original(noise_multiplier=error * noise_multiplier, accountant=accountant, **options)  # type: ignore

    monkeypatch.setattr("fsdp_dp.accounting.epsilon", wrong)
    with pytest.raises(AccountingError, match="contradict each other"):
        cross_check(PRIVACY, 1.0, 10)


def test_what_cannot_be_compared_is_said() -> None:
    for privacy, sigma in (
        (dataclasses.replace(PRIVACY, accountant="rdp"), 1.0),
        (dataclasses.replace(PRIVACY, accountant="pld", max_batch_size=20), 1.0),
        (PRIVACY, 0.0),
    ):
        assert cross_check(privacy, sigma, 100).startswith("epsilon not cross-checked")


def test_an_accountant_is_not_compared_with_itself() -> None:
    """Seen to fail when "cross-checked" was said of two calls that had taken the same way."""
    assert "prv' cannot bound it" in cross_check(PRIVACY, 0.01, 5)  # "prv" falls back to "pld"
    shuffled = dataclasses.replace(PRIVACY, sampling="shuffle")
    assert "without sampling it is a formula" in cross_check(shuffled, 1.0, 100)


@pytest.mark.parametrize(("cap", "cost"), [(10, 1.2), (25, 0.0)])
def test_cut_draws_cost_what_dp_accounting_says(cap: int, cost: float) -> None:
    """Seen to fail, as does the calibration below, when the accountant takes draws for uncut ones."""
    ours = epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=10, delta=1e-5, accountant="pld", cap=Cap(1000, cap))
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL)
    event = dp_event.TruncatedSubsampledGaussianDpEvent(1000, 0.01, cap, 1.0)
    accountant.compose(dp_event.SelfComposedDpEvent(event, 10))
    theirs = accountant.get_epsilon(1e-5)
    assert ours.upper == pytest.approx(theirs, rel=5e-3)
    assert ours.upper >= theirs * (1 - 2e-3)
    free = epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=10, delta=1e-5, accountant="pld").upper
    assert ours.upper >= max(free, cost * free) * (1 - 1e-3)


def test_a_budget_is_calibrated_for_cut_draws() -> None:
    privacy = dataclasses.replace(
        PRIVACY, noise_multiplier=None, target_epsilon=2.0, accountant="pld", max_batch_size=15, steps=10
    )
    sigma = calibrate_for(privacy)
    assert 1.99 < epsilon_for(privacy, sigma, 10, 1e-5).upper <= 2.0
    assert sigma > calibrate_for(dataclasses.replace(privacy, max_batch_size=None))
    assert "at most 15 rows; a draw is cut with probability 0.0" in cost_of_cap(privacy, sigma, 10)


def test_other_accountants_do_not_know_cut_draws() -> None:
    with pytest.raises(ValueError, match="accountant must be 'pld'"):
        epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=1, delta=1e-5, cap=Cap(1000, 20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 9, "accountant": "pld"}, "max_batch_size must be an integer of at least 10, found 9"),
        ({"max_batch_size": 1001, "accountant": "pld"}, "max_batch_size=1001 is more than dataset_size=1000"),
        ({"max_batch_size": 20}, "max_batch_size needs sampling='poisson' and accountant='pld'"),
        ({"max_batch_size": 20, "accountant": "pld", "sampling": "shuffle"}, "max_batch_size needs sampling='poisson'"),
        ({"max_batch_size": 20.0, "accountant": "pld"}, "max_batch_size must be an integer"),
    ],
)
def test_a_cap_is_checked(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRIVACY, **options)
