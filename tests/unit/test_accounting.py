"""Epsilon against published values, closed forms and another package, in both directions; calibration; what is refused.

The table is PEERS.md's: `prv` values by prv-accountant 0.2, `pld` by dp-accounting 0.6, `rdp` by Opacus 1.6.
"""

import functools
import itertools
import math
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats

from fsdp_dp.accountants import gaussian, prv
from fsdp_dp.accountants.privacy_loss import PrivacyLoss
from fsdp_dp.accounting import (
    AccountingError,
    EpsilonBounds,
    Mechanism,
    calibrate_for,
    calibrate_noise_multiplier,
    epsilon,
    epsilon_for,
    epsilon_schedule,
    schedule_for,
)
from fsdp_dp.config import PrivacyConfig

# sample_rate, noise_multiplier, steps, delta: lower, estimate, upper of prv; pld; rdp.
TABLE = [
    ((0.01, 1.0, 1_000, 1e-5), (1.818, 1.8282, 1.838), 1.8282, 2.101),
    ((0.01, 0.4, 1_000, 1e-5), (27.62, 27.72, 27.83), 27.72, 31.65),
    ((0.01, 20.0, 1_000, 1e-5), (0.0444, 0.0454, 0.0464), 0.0454, 0.052),
    ((1e-4, 1.0, 1_000_000, 1e-5), (0.449, 0.459, 0.469), 0.4595, 0.629),
    ((0.01, 1.0, 1_000, 1e-10), (3.190, 3.291, 3.391), 3.2905, 3.725),
    ((1.0, 20.0, 1_000, 1e-5), (7.501, 7.5113, 7.522), 7.51128, 8.079),
]
SLOW = (1e-4, 1.0, 1_000_000, 1e-5)
TABLE_PRV = [
    pytest.param(*row[:2], marks=[pytest.mark.slow] if row[0] == SLOW else [], id=str(row[0])) for row in TABLE
]

# Where the directions are compared: little and much noise, small and large rates, the regime that prv-accountant's own
# discretiser refuses (0.3, 1, 1000), many steps.
MECHANISMS = [
    (0.01, 1.0, 1_000, 1e-5),
    (0.1, 1.0, 150, 1e-6),
    (0.01, 0.4, 1_000, 1e-5),
    (0.3, 1.0, 1_000, 1e-6),
    (0.9, 2.0, 20, 1e-5),
    (0.01, 20.0, 1_000, 1e-5),
    (0.001, 0.7, 30_000, 1e-7),
    (0.05, 1.0, 1, 1e-5),
]


@functools.cache
def bounds(case: tuple[float, float, int, float], accountant: Any = "prv") -> EpsilonBounds:
    sample_rate, noise_multiplier, steps, delta = case
    return epsilon(
        noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps, delta=delta, accountant=accountant
    )


@functools.cache
def pld_directions(case: tuple[float, float, int, float]) -> dict[str, float]:
    """dp-accounting's epsilon in each direction, on a grid finer than the library's."""
    from dp_accounting.pld import privacy_loss_distribution

    sample_rate, noise_multiplier, steps, delta = case
    interval = bounds(case, "pld").upper * math.sqrt(2e-5 / steps)
    release = privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sample_rate, value_discretization_interval=min(interval, 2e-3)
    )
    composed = release.self_compose(steps)
    return {
        "add": composed._pmf_add.get_epsilon_for_delta(delta),
        "remove": composed._pmf_remove.get_epsilon_for_delta(delta),
    }


def gaussian_delta(eps: float, mu: float) -> float:
    return stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * stats.norm.cdf(-mu / 2 - eps / mu)


# The table


@pytest.mark.parametrize(("case", "published"), TABLE_PRV)
def test_prv_reproduces_the_table(case: tuple[float, float, int, float], published: tuple[float, float, float]) -> None:
    lower, estimate, upper = bounds(case)
    assert published[0] - 5e-4 * published[1] <= lower <= estimate <= upper <= published[2] + 5e-4 * published[1]
    assert estimate == pytest.approx(published[1], rel=2e-3)


@pytest.mark.parametrize(("case", "published"), [(row[0], row[2]) for row in TABLE])
def test_pld_reproduces_the_table(case: tuple[float, float, int, float], published: float) -> None:
    lower, estimate, upper = bounds(case, "pld")
    assert lower < estimate < upper  # part of delta is held back for rounding
    assert upper == pytest.approx(published, rel=3e-3)


@pytest.mark.parametrize(("case", "published"), [(row[0], row[3]) for row in TABLE])
def test_rdp_reproduces_the_table(case: tuple[float, float, int, float], published: float) -> None:
    assert bounds(case, "rdp").upper == pytest.approx(published, rel=1e-2)


# Both directions


@pytest.mark.parametrize("case", MECHANISMS, ids=str)
def test_upper_bound_holds_in_both_directions(case: tuple[float, float, int, float]) -> None:
    lower, _, upper = bounds(case)
    true = pld_directions(case)
    assert upper >= max(true.values()) * (1 - 1e-5)
    assert lower <= max(true.values())
    assert upper - lower <= 0.05 * upper


@pytest.mark.parametrize("case", [case for case in MECHANISMS if case[1] <= 2], ids=str)
@pytest.mark.parametrize("direction", ["add", "remove"])
def test_each_direction_by_itself(case: tuple[float, float, int, float], direction: Any) -> None:
    sample_rate, noise_multiplier, steps, delta = case
    true = pld_directions(case)[direction]
    loss = PrivacyLoss(Mechanism(noise_multiplier, sample_rate), direction)
    with np.errstate(all="ignore"):
        [(lower, estimate, upper)] = prv.in_direction(loss, [steps], delta, eps_error=5e-3 * true)
    assert lower <= true <= upper
    assert estimate == pytest.approx(true, rel=1e-3)


def test_the_directions_differ() -> None:
    """So that the tests above tell them apart: one direction alone is far from the other."""
    true = pld_directions((0.1, 1.0, 150, 1e-6))
    assert true["remove"] > 1.5 * true["add"]


@pytest.mark.parametrize("mechanism", [Mechanism(1.0, 0.1), Mechanism(0.4, 0.01), Mechanism(20.0, 0.3)], ids=str)
def test_loss_masses(mechanism: Mechanism) -> None:
    """ "remove" is prv-accountant's variable; "add" follows from P_add(-t) = exp(-t) P_remove(t) on narrow cells."""
    from prv_accountant import PoissonSubsampledGaussianMechanism

    edges = np.linspace(-3, 3, 60_001)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        remove = PrivacyLoss(mechanism, "remove").masses(edges)
        add = PrivacyLoss(mechanism, "add").masses(edges)
        peer = PoissonSubsampledGaussianMechanism(mechanism.sample_rate, mechanism.noise_multiplier)
        expected = np.asarray(peer.probability(edges[:-1], edges[1:]), dtype=float)
    assert np.abs(remove - expected).max() < 1e-12
    centres = (edges[:-1] + edges[1:]) / 2
    np.testing.assert_allclose(add[::-1], np.exp(-centres) * remove, rtol=1e-3, atol=1e-14)


@pytest.mark.parametrize("mechanism", [Mechanism(1.0, 0.1), Mechanism(0.4, 0.01), Mechanism(5.0, 0.5)], ids=str)
@pytest.mark.parametrize("direction", ["add", "remove"])
def test_loss_mean(mechanism: Mechanism, direction: Any) -> None:
    sigma, q, _ = mechanism

    def weighted(x: float) -> float:
        without, shifted = stats.norm.pdf(x, 0, sigma), stats.norm.pdf(x, 1, sigma)
        with_row = (1 - q) * without + q * shifted
        ratio = math.log(with_row / without)
        return ratio * with_row if direction == "remove" else -ratio * without

    nodes = np.linspace(-10 * sigma, 1 + 10 * sigma, 30)
    expected = sum(integrate.quad(weighted, *pair)[0] for pair in itertools.pairwise(nodes))
    assert PrivacyLoss(mechanism, direction).mean() == pytest.approx(expected, abs=1e-12)


# Without subsampling


@pytest.mark.parametrize("accountant", ["prv", "pld"])
@pytest.mark.parametrize(
    ("sigma", "steps", "delta"), [(20.0, 1000, 1e-5), (1.0, 1, 1e-5), (50.0, 3, 1e-12), (0.5, 9, 0.1)]
)
def test_full_batches_are_exact(sigma: float, steps: int, delta: float, accountant: Any) -> None:
    lower, _, upper = bounds((1.0, sigma, steps, delta), accountant)
    mu = math.sqrt(steps) / sigma
    assert gaussian_delta(upper, mu) <= delta * (1 + 1e-9) and (
        lower == 0 or gaussian_delta(lower, mu) >= delta * (1 - 1e-9)
    )
    assert upper - lower <= 1e-8 * upper


@pytest.mark.parametrize(
    ("sigma", "steps", "delta"), [(20.0, 1000, 1e-5), (20.0, 1000, 1e-12), (200.0, 100_000, 1e-9), (3.0, 10, 1e-10)]
)
def test_almost_full_batches_meet_the_closed_form(sigma: float, steps: int, delta: float) -> None:
    """The discretised accountants where epsilon is known exactly, small deltas included."""
    exact = bounds((1.0, sigma, steps, delta)).upper
    lower, estimate, upper = bounds((1 - 1e-12, sigma, steps, delta))
    assert lower <= exact <= upper and estimate == pytest.approx(exact, rel=1e-4)
    try:
        assert bounds((1 - 1e-12, sigma, steps, delta), "pld").upper >= exact
    except AccountingError as refusal:
        assert delta < 1e-11 and "rounding errors" in str(refusal)


# Edges, order, refusals


@pytest.mark.parametrize("accountant", ["prv", "pld", "rdp"])
def test_no_steps_and_no_noise(accountant: Any) -> None:
    assert bounds((0.1, 1.0, 0, 1e-5), accountant) == (0, 0, 0)
    assert bounds((0.1, 0.0, 0, 1e-5), accountant) == (0, 0, 0)
    assert bounds((0.1, 0.0, 5, 1e-5), accountant) == (math.inf, math.inf, math.inf)


@pytest.mark.parametrize("accountant", ["prv", "pld", "rdp"])
@pytest.mark.parametrize("rate", [0.05, 1.0])
def test_monotone(accountant: Any, rate: float) -> None:
    def upper(sigma: float = 1.5, rate: float = rate, steps: int = 100, delta: float = 1e-5) -> float:
        return bounds((rate, sigma, steps, delta), accountant).upper

    base = upper()
    assert upper(sigma=1.7) < base < upper(sigma=1.3)
    assert upper(steps=80) < base < upper(steps=120)
    assert upper(delta=2e-5) < base < upper(delta=5e-6)
    assert upper(rate=rate * 0.9) < base


def test_rdp_is_an_upper_bound_too() -> None:
    for case in MECHANISMS:
        assert bounds(case, "rdp").upper > bounds(case, "pld").lower
        assert bounds(case, "rdp").upper > bounds(case).estimate


@pytest.mark.parametrize("accountant", ["prv", "pld", "rdp"])
def test_a_delta_beyond_all_loss_costs_nothing(accountant: Any) -> None:
    assert 0 <= bounds((0.001, 3.0, 10, 0.2), accountant).upper < 1e-2


@pytest.mark.parametrize(("rate", "sigma", "steps"), [(0.5, 0.4, 1000), (0.01, 0.02, 5)])
def test_where_prv_accountant_itself_fails(rate: float, sigma: float, steps: int) -> None:
    lower, estimate, upper = bounds((rate, sigma, steps, 1e-5))
    assert 0.99 * estimate < lower <= estimate <= upper < 1.01 * estimate
    assert estimate <= bounds((rate, sigma, steps, 1e-5), "pld").upper <= 1.01 * estimate


def test_falls_back_to_pld() -> None:
    case = (0.01, 0.01, 5, 1e-5)  # epsilon is about 10 000: exp(epsilon) has no representation
    assert bounds(case) == bounds(case, "pld")


def test_without_pld_the_error_offers_rdp() -> None:
    code = """if True:
        import sys
        sys.modules["dp_accounting"] = None  # the import system's way of saying: not installed
        from fsdp_dp.accounting import AccountingError, epsilon
        for accountant in ("prv", "pld"):
            try:
                epsilon(noise_multiplier=0.01, sample_rate=0.01, steps=5, delta=1e-5, accountant=accountant)
            except AccountingError as error:
                assert "accountant='rdp'" in str(error) and "dp-accounting is not installed" in str(error), error
            else:
                sys.exit("no error")
        assert 1.8 < epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=1000, delta=1e-5).upper < 1.84
    """
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("accountant", ["prv", "pld"])
def test_a_delta_below_rounding_is_refused_not_guessed(accountant: Any) -> None:
    with pytest.raises(AccountingError, match=r"noise_multiplier=1, .*delta=1e-15.*rounding errors.*accountant='rdp'"):
        bounds((0.01, 1.0, 1000, 1e-15), accountant)


@pytest.mark.parametrize("sigma", [1e-200, 1e-9])
@pytest.mark.parametrize("rate", [0.5, 1.0])
@pytest.mark.parametrize("accountant", ["prv", "pld", "rdp"])
def test_infinity_and_nan_never_come_back(accountant: Any, rate: float, sigma: float) -> None:
    try:
        found = bounds((rate, sigma, 10, 1e-5), accountant)
    except AccountingError as error:
        assert f"noise_multiplier={sigma:g}" in str(error)
    else:
        assert all(math.isfinite(value) for value in found)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("noise_multiplier", value) for value in (-1.0, math.nan, math.inf, True, "1")),
        *(("sample_rate", value) for value in (0.0, -0.1, 1.5, math.nan, True, None)),
        *(("steps", value) for value in (-1, 1.0, True, "3", math.nan)),
        *(("delta", value) for value in (0.0, 1.0, -1e-5, math.nan, None)),
        *(("accountant", value) for value in ("gdp", "", None)),
    ],
)
def test_bad_arguments(option: str, value: Any) -> None:
    good = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10, "delta": 1e-5, "accountant": "prv"}
    with pytest.raises(ValueError, match=f"^{option} must be "):
        epsilon(**{**good, option: value})  # type: ignore[arg-type]


def test_no_warning_reaches_the_caller() -> None:
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        for accountant in ("prv", "pld", "rdp"):
            bounds((0.01, 0.4, 100, 1e-5), accountant)
            bounds((0.01, 50.0, 10, 1e-5), accountant)
            calibrate_noise_multiplier(
                target_epsilon=2.0,
                sample_rate=1.0,
                steps=3,
                delta=1e-5,
                accountant=accountant,  # type: ignore[arg-type]
            )


# The central limit is not an answer


def test_gdp_central_limit_is_below_the_true_value() -> None:
    """mu = q sqrt(T (exp(1/sigma^2) - 1)) (Bu et al. 2019) gives 1.618 where epsilon is above 1.818."""
    case = (0.01, 1.0, 1000, 1e-5)
    mu = 0.01 * math.sqrt(1000 * math.expm1(1.0))
    central_limit = gaussian.epsilon(mu, 1e-5).estimate
    assert central_limit == pytest.approx(1.618, abs=1e-3)
    assert bounds(case).lower > 1.818 > central_limit


# Many step counts


@pytest.mark.parametrize("accountant", ["prv", "pld", "rdp"])
def test_schedule(accountant: Any) -> None:
    steps = [500, 0, 10, 100, 500]
    table = epsilon_schedule(noise_multiplier=1.0, sample_rate=0.01, steps=steps, delta=1e-5, accountant=accountant)
    single = [bounds((0.01, 1.0, count, 1e-5), accountant) for count in steps]
    assert table[0] == table[-1] == single[0] and table[1] == (0, 0, 0)
    assert 0 < table[2].upper < table[3].upper < table[0].upper
    for many, one in zip(table, single, strict=True):
        assert one.lower <= many.upper and many.lower <= one.upper
        assert many.upper - one.upper <= 0.02 * single[0].upper


def test_schedule_without_steps() -> None:
    assert epsilon_schedule(noise_multiplier=1.0, sample_rate=0.01, steps=[], delta=1e-5) == []


# Calibration


@pytest.mark.parametrize(
    ("target", "rate", "steps", "delta"),
    [
        (8.0, 0.005, 150, 1e-6),
        (3.0, 0.01, 1000, 1e-5),
        (30.0, 0.05, 500, 1e-6),
        (0.5, 1.0, 10, 1e-5),
        (100.0, 0.3, 200, 1e-5),
    ],
)
@pytest.mark.parametrize("accountant", ["prv", "pld", "rdp"])
def test_calibration_is_safe_and_close(target: float, rate: float, steps: int, delta: float, accountant: Any) -> None:
    sigma = calibrate_noise_multiplier(
        target_epsilon=target, sample_rate=rate, steps=steps, delta=delta, accountant=accountant
    )
    assert 0.995 * target <= bounds((rate, sigma, steps, delta), accountant).upper <= target
    assert bounds((rate, sigma, steps, delta), "pld").estimate <= target * 1.002


@pytest.mark.parametrize("accountant", ["prv", "pld", "rdp"])
@pytest.mark.parametrize("target", [1e-9, 1e7])
def test_targets_out_of_reach(target: float, accountant: Any) -> None:
    with pytest.raises(AccountingError, match=r"No noise multiplier was found for target_epsilon=.*sample_rate=0.01"):
        calibrate_noise_multiplier(
            target_epsilon=target, sample_rate=0.01, steps=100, delta=1e-5, accountant=accountant
        )


@pytest.mark.parametrize("option", ["target_epsilon", "sample_rate", "steps", "delta", "accountant"])
@pytest.mark.parametrize("value", [0, -1, math.nan, True])
def test_calibration_arguments(option: str, value: Any) -> None:
    good = {"target_epsilon": 3.0, "sample_rate": 0.1, "steps": 10, "delta": 1e-5, "accountant": "rdp"}
    with pytest.raises(ValueError, match=f"^{option} must be "):
        calibrate_noise_multiplier(**{**good, option: value})  # type: ignore[arg-type]


# By configuration


def config(**changes: Any) -> PrivacyConfig:
    good = {"max_grad_norm": 1.0, "expected_batch_size": 100, "dataset_size": 1_050, "target_delta": 1e-5}
    return PrivacyConfig(**{**good, "accountant": "pld", **changes})


@pytest.mark.parametrize("sampling", ["poisson", "external_poisson"])
def test_poisson_is_amplified(sampling: str) -> None:
    privacy = config(noise_multiplier=1.0, sampling=sampling)
    assert epsilon_for(privacy, 1.0, 50, 1e-5) == bounds((100 / 1_050, 1.0, 50, 1e-5), "pld")
    assert calibrate_for(privacy) == 1.0


def test_shuffle_is_one_unamplified_release_an_epoch() -> None:
    """Ten whole batches an epoch: 1 to 10 steps touch one epoch, 11 touch two."""
    privacy = config(noise_multiplier=2.0, sampling="shuffle")
    found = schedule_for(privacy, 2.0, [0, 1, 10, 11, 20, 21], 1e-5)
    assert found == [bounds((1.0, 2.0, epochs, 1e-5)) for epochs in (0, 1, 1, 2, 2, 3)]
    assert found[1].upper > epsilon_for(config(noise_multiplier=2.0), 2.0, 10, 1e-5).upper
    whole = config(noise_multiplier=2.0, sampling="shuffle", expected_batch_size=1_050)
    assert epsilon_for(whole, 2.0, 3, 1e-5) == bounds((1.0, 2.0, 3, 1e-5))


@pytest.mark.parametrize("sampling", ["poisson", "shuffle"])
def test_a_budget_is_met_over_all_steps(sampling: str) -> None:
    privacy = config(target_epsilon=4.0, steps=25, sampling=sampling)
    sigma = calibrate_for(privacy)
    assert 0.995 * 4 <= epsilon_for(privacy, sigma, 25, 1e-5).upper <= 4
    assert epsilon_for(privacy, sigma, 40, 1e-5).upper > 4


def test_no_noise_has_no_epsilon() -> None:
    assert epsilon_for(config(noise_multiplier=0.0), 0.0, 1, 1e-5).upper == math.inf
    assert epsilon_for(config(noise_multiplier=0.0, sampling="shuffle"), 0.0, 1, 1e-5).upper == math.inf


def test_bad_step_counts_by_configuration() -> None:
    for sampling in ("poisson", "shuffle"):
        with pytest.raises(ValueError, match=r"^steps must be "):
            epsilon_for(config(noise_multiplier=1.0, sampling=sampling), 1.0, 2.5, 1e-5)  # type: ignore[arg-type]


def test_imports_no_torch() -> None:
    """Neither the module nor its default accountants; and the check can fail."""
    code = """if True:
        import sys
        from fsdp_dp.accounting import epsilon
        for accountant in ("prv", "pld"):
            epsilon(noise_multiplier=1.0, sample_rate=0.1, steps=3, delta=1e-5, accountant=accountant)
        sys.exit(any(name.split(".")[0] == "torch" for name in sys.modules))
    """
    preloaded = "import sys; sys.modules['torch.nn'] = sys\n"
    for prefix, expected in (("", 0), (preloaded, 1)):
        assert subprocess.run([sys.executable, "-c", prefix + code], check=False).returncode == expected
