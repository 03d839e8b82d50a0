"""The guard of the draws: never against a healthy loader, and against rows that no accountant assumes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats

from fsdp_dp import PrivacyConfig, PrivacyError, noise
from fsdp_dp.draw_guard import _TAIL, DrawGuard, in_common, is_unlikely
from fsdp_dp.sampling import _global_draw

KEY = noise.key_from_seed(1)


def guarded(**options: Any) -> tuple[DrawGuard, Any]:
    """A guard, and the draws of the loader that it is for."""
    given = {"expected_batch_size": 40, "dataset_size": 400, "target_delta": 1e-4} | options
    privacy = PrivacyConfig(max_grad_norm=1.0, noise_multiplier=1.0, **given)
    return DrawGuard(privacy), _global_draw(KEY, privacy)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"expected_batch_size": 1},
        {"expected_batch_size": 399},
        {"expected_batch_size": 400},
        {"max_batch_size": 41, "accountant": "pld"},
        {"sampling": "shuffle"},
        {"sampling": "shuffle", "expected_batch_size": 30},
    ],
    ids=str,
)
def test_healthy_draws_pass(options: dict[str, Any]) -> None:
    guard, draw = guarded(**options)
    for number in range(500):
        drawn = draw(number)
        assert guard.look(number, drawn) is drawn
    for number in (490, 491, 499, 500, 501):  # an iteration that was left early: its draws are made again
        guard.look(number, draw(number))


@pytest.mark.parametrize(
    ("options", "draws", "message"),
    [
        ({}, lambda draw, i: draw(0), "the same rows"),
        ({}, lambda draw, i: torch.arange(40) + 40 * (i % 10), "or none of the same"),
        ({}, lambda draw, i: draw(i)[:-4], "the number of rows"),
        ({"max_batch_size": 60, "accountant": "pld"}, lambda draw, i: torch.arange(60), "the same rows"),
        ({"expected_batch_size": 8}, lambda draw, i: torch.cat([draw(i), draw(i + 1000)]).unique(), "the number of rows"),
        ({}, lambda draw, i: draw(i) + 40, "none of the 400"),
        ({}, lambda draw, i: draw(i).repeat_interleave(2), "more than once"),
        ({"sampling": "shuffle"}, lambda draw, i: draw(0), "twice in one epoch"),
        ({"sampling": "shuffle"}, lambda draw, i: draw(i)[:-1], "expected_batch_size"),
        ({"sampling": "shuffle"}, lambda draw, i: draw(i).index_fill(0, torch.tensor([0, 1]), 7), "more than once"),
    ],
)  # fmt: skip
def test_others_are_refused(options: dict[str, Any], draws: Any, message: str) -> None:
    guard, draw = guarded(**options)
    with pytest.raises(PrivacyError, match=message):
        for number in range(200):
            guard.look(number, draws(draw, number))


@pytest.mark.parametrize(("trials", "rate"), [(10, 0.5), (1000, 0.01), (10**6, 0.3), (10**9, 1e-7)])
def test_what_is_unlikely_has_the_probability_that_it_should(trials: int, rate: float) -> None:
    binomial, mean = stats.binom(trials, rate), round(trials * rate)
    width = 12 * round((trials * rate) ** 0.5) + 60
    refused = [k for k in range(max(0, mean - width), min(trials, mean + width) + 1) if is_unlikely(k, trials, rate)]
    low, high = [k for k in refused if k < mean], [k for k in refused if k > mean]
    assert not is_unlikely(mean, trials, rate)
    for found, side in ((low, binomial.logcdf(max(low, default=0))), (high, binomial.logsf(min(high, default=1) - 1))):
        assert not found or side <= -_TAIL
    assert not any(is_unlikely(k, trials, rate, at_most=True) for k in low)


def test_certain_rows_are_certain() -> None:
    assert (
        not is_unlikely(5, 5, 1.0) and is_unlikely(4, 5, 1.0) and is_unlikely(1, 5, 0.0) and not is_unlikely(0, 5, 0.0)
    )


def test_rows_in_common_are_counted() -> None:
    assert in_common(torch.tensor([1, 4, 9]), torch.tensor([4, 5, 9, 11])) == 2
    assert in_common(torch.tensor([12]), torch.tensor([4])) == in_common(torch.empty(0), torch.tensor([4])) == 0
