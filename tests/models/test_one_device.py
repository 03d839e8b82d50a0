"""Hugging Face models on one device: a private update is what a float64 loop over rows makes it, or the model is refused."""

import pytest

from tests.agreement import assert_exact
from tests.models.zoo import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_update_is_the_oracles(name: str) -> None:
    assert_exact(MODELS[name])
