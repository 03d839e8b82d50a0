"""PrivacyConfig: what it accepts, what it refuses, and that its messages help."""

import dataclasses
import math
import subprocess
import sys
import warnings
from typing import Any

import pytest

from fsdp_dp.config import PrivacyConfig

GOOD: dict[str, Any] = {
    "max_grad_norm": 1.0,
    "noise_multiplier": 1.1,
    "expected_batch_size": 32,
    "dataset_size": 1000,
    "target_delta": 1e-4,
}


def config(**changes: Any) -> PrivacyConfig:
    return PrivacyConfig(**{**GOOD, **changes})


def without(option: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != option}


def test_defaults_and_sample_rate() -> None:
    privacy = config()
    assert privacy.sample_rate == 0.032
    assert (privacy.steps, privacy.target_epsilon, privacy.seed) == (None, None, None)
    assert (privacy.sampling, privacy.clipping, privacy.clip_function) == ("poisson", "flat", "abadi")
    assert (privacy.numerics, privacy.loss_reduction, privacy.accountant) == ("certified", "mean", "prv")


def test_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().max_grad_norm = 2.0  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        PrivacyConfig(1.0, 32, 1000)  # type: ignore[call-arg,misc]


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": 0},
        {"noise_multiplier": None, "target_epsilon": 3, "steps": 10},
        {"expected_batch_size": 1000},
        {"expected_batch_size": 1000, "sampling": "shuffle"},
        {
            "sampling": "external_poisson",
            "numerics": "nominal",
            "loss_reduction": "sum",
            "accountant": "pld",
            "seed": 0,
        },
        {"accountant": "rdp", "steps": 1, "seed": 2**63},
    ],
)
def test_accepts(changes: dict[str, Any]) -> None:
    config(**changes)


NOT_NUMBERS = [math.nan, math.inf, -math.inf, True, "1.0", None, [1.0], 1j, 10**400]
NOT_INTEGERS = [1.0, 2.5, math.nan, math.inf, True, "8", [8], -1]


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0.0, -1.0], ids=repr)
def test_refuses_max_grad_norm(value: Any) -> None:
    with pytest.raises(ValueError, match=r"max_grad_norm must be a finite number above 0.0, found "):
        config(max_grad_norm=value)


@pytest.mark.parametrize("value", [*(bad for bad in NOT_NUMBERS if bad is not None), -0.1], ids=repr)
def test_refuses_noise_multiplier(value: Any) -> None:
    with pytest.raises(ValueError, match=r"noise_multiplier must be a finite number at least 0.0, found "):
        config(noise_multiplier=value)


@pytest.mark.parametrize("value", [*(bad for bad in NOT_NUMBERS if bad is not None), 0.0, -3], ids=repr)
def test_refuses_target_epsilon(value: Any) -> None:
    with pytest.raises(ValueError, match=r"target_epsilon must be a finite number above 0.0, found "):
        config(noise_multiplier=None, target_epsilon=value, steps=10)


@pytest.mark.parametrize("value", [*(bad for bad in NOT_NUMBERS if bad is not None), 0.0, 1.0, -1e-5], ids=repr)
def test_refuses_target_delta(value: Any) -> None:
    with pytest.raises(ValueError, match=r"target_delta must be a finite number above 0.0 and below 1.0, found "):
        config(target_delta=value)


@pytest.mark.parametrize("option", ["expected_batch_size", "dataset_size", "steps"])
@pytest.mark.parametrize("value", [*NOT_INTEGERS, 0], ids=repr)
def test_refuses_counts(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{option} must be an integer of at least 1, found "):
        config(**{option: value})


@pytest.mark.parametrize("value", NOT_INTEGERS, ids=repr)
def test_refuses_seed(value: Any) -> None:
    with pytest.raises(ValueError, match=r"seed must be an integer of at least 0, found "):
        config(seed=value)


@pytest.mark.parametrize(
    ("option", "allowed"),
    [
        ("sampling", "'poisson', 'external_poisson', 'shuffle'"),
        ("clipping", "'flat', 'block', 'layer', 'parameter'"),
        ("clip_function", "'abadi', 'automatic', 'normalized'"),
        ("numerics", "'certified', 'nominal'"),
        ("loss_reduction", "'mean', 'sum'"),
        ("accountant", "'prv', 'pld', 'rdp'"),
    ],
)
@pytest.mark.parametrize("value", ["stage", "", None, 3, ["flat"]], ids=repr)
def test_refuses_unknown_choices_and_lists_the_allowed(option: str, allowed: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        config(**{option: value})
    assert str(caught.value) == f"{option} must be one of {allowed}, found {value!r} ({type(value).__name__})."


def test_the_value_found_is_shown_with_its_type() -> None:
    with pytest.raises(ValueError, match=r"found '32' \(str\)\.$"):
        config(expected_batch_size="32")


@pytest.mark.parametrize("option", ["max_grad_norm", "expected_batch_size", "dataset_size"])
def test_required_options(option: str) -> None:
    with pytest.raises(TypeError, match=option):
        PrivacyConfig(**without(option))


def test_missing_delta_suggests_one() -> None:
    with pytest.raises(ValueError, match=r"target_delta is required.*1/\(10\*dataset_size\) = 0.0001"):
        PrivacyConfig(**without("target_delta"))


def test_exactly_one_of_noise_and_budget() -> None:
    with pytest.raises(
        ValueError, match=r"Exactly one of noise_multiplier and target_epsilon is needed, found neither"
    ):
        PrivacyConfig(**without("noise_multiplier"))
    with pytest.raises(ValueError, match=r"Exactly one of noise_multiplier and target_epsilon is needed, found both"):
        config(target_epsilon=3.0, steps=10)


def test_a_budget_needs_steps() -> None:
    with pytest.raises(ValueError, match=r"target_epsilon=3.0 needs steps, found None"):
        config(noise_multiplier=None, target_epsilon=3.0)


@pytest.mark.parametrize("sampling", ["poisson", "external_poisson", "shuffle"])
def test_a_batch_larger_than_the_data_set(sampling: str) -> None:
    with pytest.raises(ValueError, match=r"expected_batch_size=1001 is more than dataset_size=1000"):
        config(expected_batch_size=1001, sampling=sampling)


@pytest.mark.parametrize("delta", [1e-3, 0.5])
def test_a_large_delta_warns_at_the_caller(delta: float) -> None:
    with pytest.warns(UserWarning, match=r"target_delta=.* is not below 1/dataset_size = 0.001") as caught:
        PrivacyConfig(**{**GOOD, "target_delta": delta})
    assert caught[0].filename == __file__


def test_a_small_delta_and_a_seed_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config(target_delta=9.99e-4, seed=3)


def test_imports_no_torch() -> None:
    """And the check can fail."""
    code = "import sys, fsdp_dp.config; sys.exit('torch' in sys.modules)"
    preloaded = "import sys; sys.modules['torch'] = sys; "
    for prefix, expected in (("", 0), (preloaded, 1)):
        assert subprocess.run([sys.executable, "-c", prefix + code], check=False).returncode == expected
