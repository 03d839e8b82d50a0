"""The audit of a healthy engine finds less than the accountant claims; its statistics against the definition."""

from __future__ import annotations

import math
import random

import pytest

from fsdp_dp.auditing import Audit, epsilon_at_least, guess_counts, lower_bound, p_value, reach, right_guesses
from fsdp_dp.training.audit_options import AuditConfig, AuditOptions
from tests.broken_engines.faults import audited

CI_SEEDS, SLOW_SEEDS = range(2), range(2, 22)


def assert_below_the_claim(seed: int) -> None:
    with pytest.warns(UserWarning, match="seed fixed"):
        found = audited(seed, noise_multiplier=1.0, seed=seed)
    assert found.consistent and 0.1 < found.found.epsilon < found.claimed


@pytest.mark.parametrize("seed", CI_SEEDS)
def test_a_healthy_engine_is_consistent(seed: int) -> None:
    assert_below_the_claim(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SLOW_SEEDS)
def test_a_healthy_engine_is_consistent_many_times(seed: int) -> None:
    assert_below_the_claim(seed)


def exact_tail(guesses: int, right: int, q: float) -> float:
    return sum(math.comb(guesses, i) * q**i * (1 - q) ** (guesses - i) for i in range(right, guesses + 1))


@pytest.mark.parametrize(("guesses", "right"), [(10, 10), (10, 6), (10, 0), (1, 1)])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0])
def test_without_delta_it_is_the_tail_of_randomized_response(guesses: int, right: int, epsilon: float) -> None:
    found = p_value(canaries=20, guesses=guesses, right=right, epsilon=epsilon, delta=0.0)
    assert found == pytest.approx(exact_tail(guesses, right, 1 / (1 + math.exp(-epsilon))))


def test_delta_adds_its_correction() -> None:
    """Worked by hand: of 2 right guesses of 2 at epsilon 0, P[W = 1] / 1 = 1/2 and P[W in {0, 1}] / 2 = 3/8."""
    found = p_value(canaries=10, guesses=2, right=2, epsilon=0.0, delta=1e-3)
    assert found == pytest.approx(1 / 4 + 2 * 10 * 1e-3 * 1 / 2)


def test_perfect_guesses_bound_epsilon_as_far_as_their_number_allows() -> None:
    for guesses in (20, 200):
        found = epsilon_at_least(canaries=guesses, guesses=guesses, right=guesses, delta=0.0, confidence=0.999)
        assert (1 / (1 + math.exp(-found))) ** guesses == pytest.approx(1e-3, rel=1e-3)
    assert epsilon_at_least(canaries=20, guesses=20, right=10, delta=0.0, confidence=0.999) == 0.0


def test_randomized_response_is_not_refuted_and_nearly_reached() -> None:
    """The mechanism for which the theorem is tight."""
    epsilon, generator, found = 1.0, random.Random(0), []
    for _ in range(10):
        coins = [generator.random() < 0.5 for _ in range(1000)]
        truth = 1 / (1 + math.exp(-epsilon))
        scores = [(coin if generator.random() < truth else not coin) + 1e-6 * generator.random() for coin in coins]
        found.append(lower_bound(scores, coins, delta=0.0).epsilon)
    assert max(found) <= epsilon and sum(found) / len(found) > 0.5


def test_guesses_are_made_at_both_ends() -> None:
    assert guess_counts(101) == [100, 50, 24, 12]
    assert right_guesses([0.0, 1.0, 2.0, 3.0], [False, True, False, True], 2) == 2
    assert right_guesses([0.0, 1.0, 2.0, 3.0], [True, True, False, False], 4) == 0


@pytest.mark.parametrize("scores", [[0.0] * 4, [math.nan] * 20])
def test_scores_that_say_nothing_are_refused(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="at least 8 canaries, each with a finite score"):
        lower_bound(scores, [True] * len(scores), delta=0.0)


def test_it_says_where_no_engine_would_have_been_caught() -> None:
    coins = [i % 2 == 0 for i in range(400)]
    most = reach(coins, delta=1e-10)
    assert 3 < most < math.log(400)
    found = lower_bound([0.0] * 400, coins, delta=1e-10)
    for claimed, told in ((most - 0.1, "audit: consistent\n"), (most + 0.1, "consistent, as it had to be")):
        of_audit = Audit(found=found, claimed=claimed, reach=most, mechanism={})
        assert of_audit.consistent and of_audit.could_refute == (claimed < most) and told in str(of_audit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"canaries": 8}, "audit.canaries=8 cannot show an epsilon above 0"),
        ({"delta": 0.4}, "cannot show an epsilon above 0 at delta 0.4"),
        ({"norm": 1e30}, "audit.norm must be"),
        ({"norm": 1e-30}, "audit.norm must be"),
    ],
)
def test_canaries_that_show_nothing_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AuditConfig(audit=AuditOptions(**options))  # type: ignore[arg-type]


def test_an_audit_does_not_go_on_with_a_run() -> None:
    with pytest.raises(ValueError, match=r"resume=true is for fsdp_dp\.train"):
        AuditConfig(resume=True, output_dir="somewhere")


def test_a_capped_batch_can_be_audited() -> None:
    found = audited(max_batch_size=300, accountant="pld", batch_size=200)
    assert found.consistent


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="0 <= right <= guesses <= canaries"):
        p_value(canaries=10, guesses=11, right=1, epsilon=0.0, delta=0.0)
