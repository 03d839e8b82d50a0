"""The cost of tuning: plain composition, and theorem 2 of Papernot and Steinke (arXiv 2110.03620), against the paper."""

import math
import random
from pathlib import Path

import pytest

from fsdp_dp import accounting, sweep
from fsdp_dp.accountants import renyi
from fsdp_dp.accounting import AccountingError, Cap, Mechanism
from fsdp_dp.training.schema import PrivacyOptions
from fsdp_dp.tuning import (
    Trial,
    composed_epsilon,
    draw_number,
    first_probability,
    gamma_for,
    mean_number,
    selected,
    selection_epsilon,
)
from tests.unit.test_report import make_run

TRIAL = Trial(Mechanism(1.0, 0.01), 1000)
DELTA = 1e-5


def probabilities(eta: float, gamma: float, most: int) -> list[float]:
    """P[K = k] for k = 1, 2, ... as definition 1 writes it: a product over l < k."""
    found = []
    for k in range(1, most + 1):
        if eta == 0:
            found.append((1 - gamma) ** k / (k * math.log(1 / gamma)))
        else:
            product = math.prod((index + eta) / (index + 1) for index in range(k))
            found.append((1 - gamma) ** k / (gamma**-eta - 1) * product)
    return found


@pytest.mark.parametrize("eta", [-0.5, 0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("gamma", [0.1, 0.6])
def test_the_number_of_trials_is_distributed_as_in_definition_1(eta, gamma):
    expected = probabilities(eta, gamma, 600)
    assert sum(expected) == pytest.approx(1, abs=1e-9)
    assert first_probability(eta=eta, gamma=gamma) == pytest.approx(expected[0])
    mean = sum(k * probability for k, probability in enumerate(expected, start=1))
    assert mean_number(eta=eta, gamma=gamma) == pytest.approx(mean)
    assert gamma_for(mean, eta=eta) == pytest.approx(gamma, rel=1e-6)
    source, draws = random.Random(0), 4000
    found = [draw_number(eta=eta, gamma=gamma, source=source) for _ in range(draws)]
    for k in (1, 2, 3):
        p = expected[k - 1]
        assert abs(found.count(k) / draws - p) < 5 * math.sqrt(p * (1 - p) / draws)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
def test_the_bound_is_that_of_theorem_2(eta):
    """By hand for divergences of two orders, where the least second order can be seen; and dp-accounting's."""
    rdp = pytest.importorskip("dp_accounting.rdp.rdp_privacy_accountant")
    one, gamma = [(4.0, 0.2), (16.0, 0.8)], 0.05
    mean = sum(k * p for k, p in enumerate(probabilities(eta, gamma, 900), start=1))
    second = min((1 - 1 / 4) * 0.2 + math.log(20) / 4, (1 - 1 / 16) * 0.8 + math.log(20) / 16)
    by_hand = {a: e + (1 + eta) * second + math.log(mean) / (a - 1) for a, e in one}
    assert dict(selected(one, eta=eta, gamma=gamma)) == pytest.approx(by_hand)

    orders = [order for order, _ in renyi.log_moments(TRIAL.mechanism)]
    single = [TRIAL.releases * log_moment / (order - 1) for order, log_moment in renyi.log_moments(TRIAL.mechanism)]
    theirs = rdp.compute_epsilon(orders, rdp._compute_rdp_repeat_and_select(orders, single, mean, eta), DELTA)[0]
    ours = selection_epsilon(TRIAL, DELTA, eta=eta, gamma=gamma_for(mean, eta=eta))
    assert ours == pytest.approx(theirs, rel=1e-3) and ours >= theirs * (1 - 1e-9)


def test_more_trials_cost_more_and_one_costs_more_than_a_run_alone():
    alone = composed_epsilon([TRIAL], DELTA, "rdp").upper
    costs = [selection_epsilon(TRIAL, DELTA, eta=0.0, gamma=gamma_for(mean, eta=0.0)) for mean in (2, 10, 100)]
    assert alone < costs[0] < costs[1] < costs[2]
    assert costs[2] < composed_epsilon([TRIAL] * 100, DELTA, "prv").upper


def test_equal_runs_are_one_long_run():
    both = composed_epsilon([TRIAL, TRIAL], DELTA, "prv")
    assert both == accounting.epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=2000, delta=DELTA)


def test_unequal_runs_compose_to_an_upper_bound():
    """Above dp-accounting's composition of privacy loss distributions, and not by much."""
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    other = Trial(Mechanism(1.5, 0.02), 500)
    both = [
        pld.from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=1e-3).self_compose(releases)
        for (sigma, q, _), releases in (TRIAL, other)
    ]
    tight = both[0].compose(both[1]).get_epsilon_for_delta(DELTA)
    upper = composed_epsilon([TRIAL, other], DELTA, "prv").upper
    assert tight < upper < 1.4 * tight
    assert upper > composed_epsilon([TRIAL], DELTA, "prv").upper


def test_what_has_no_known_divergence_is_refused():
    cut = Trial(Mechanism(1.0, 0.01, Cap(1000, 30)), 10)
    for trials in ([TRIAL, cut], [TRIAL, Trial(Mechanism(0.0, 0.01), 10)]):
        with pytest.raises(AccountingError, match="no Renyi divergence is known"):
            composed_epsilon(trials, DELTA, "pld")
    for eta, gamma in ((-1.0, 0.5), (0.0, 1.0), (0.0, 0.0)):
        with pytest.raises(ValueError, match=r"eta|gamma"):
            selection_epsilon(TRIAL, DELTA, eta=eta, gamma=gamma)


@pytest.mark.parametrize("delta", [math.nan, 0.0, 1.0, 2.0, -1.0])
def test_a_delta_that_is_none_is_refused(delta):
    """Seen to fail: NaN and 2 gave epsilon 0, for min and max pass NaN by."""
    other = Trial(Mechanism(1.5, 0.01), 10)
    with pytest.raises(ValueError, match="delta must be"):
        composed_epsilon([TRIAL, other], delta, "prv")
    with pytest.raises(ValueError, match="delta must be"):
        selection_epsilon(TRIAL, delta, eta=0.0, gamma=0.1)


@pytest.mark.parametrize("noise_multiplier", [1e-200, 1e-160, 1e-3])
@pytest.mark.parametrize("sample_rate", [0.01, 1.0])
def test_noise_out_of_range_is_refused(noise_multiplier, sample_rate):
    """Seen to fail: the square of 1e-200 is zero, every divergence NaN, and epsilon came out as 0."""
    quiet = Trial(Mechanism(noise_multiplier, sample_rate), 10)
    with pytest.raises(AccountingError, match="leaves the range"):
        composed_epsilon([TRIAL, quiet], DELTA, "prv")
    with pytest.raises(AccountingError, match="leaves the range"):
        selection_epsilon(quiet, DELTA, eta=0.0, gamma=0.1)


def epsilon_after(text: str, words: str) -> float:
    line = next(line for line in text.splitlines() if line.startswith(words))
    return float(line.split("epsilon <= ")[1].split()[0])


def test_the_command_states_what_runs_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second")
    assert sweep.main(["cost", str(first), str(second)]) == 0
    together = epsilon_after(capsys.readouterr().out, "together")
    eight = accounting.epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=8, delta=1e-6).upper
    assert together == pytest.approx(eight, rel=1e-5)


def test_the_command_refuses_what_does_not_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    for name, options, message in (
        ("plain", {"private": False}, "plain: no cost can be stated"),
        ("seeded", {"seed": 1}, "seeded: its seed was fixed"),
        ("longer", {"block_size": 64}, "rows must be the same"),
    ):
        assert sweep.main(["cost", str(run), str(make_run(tmp_path / name, **options))]) == 1
        assert message in capsys.readouterr().err


def test_a_sum_says_at_which_delta_and_on_what_it_rests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seen to fail: epsilons of runs at 1e-6 and at 1e-5 stood beside each other without a delta."""
    privacy = PrivacyOptions(noise_multiplier=1.0, target_delta=1e-5)
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", privacy=privacy)
    assert sweep.main(["cost", str(first), str(second)]) == 1
    assert "target_delta (give --delta) must be the same" in capsys.readouterr().err
    assert sweep.main(["cost", str(first), str(second), "--delta", "1e-6"]) == 0
    out = capsys.readouterr().out
    assert out.count("alone") == 2 and out.count("alone at its own delta = 1e-05") == 1
    assert "settled before the first of them" in out and "privacy odometer" in out
