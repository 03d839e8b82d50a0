"""Hugging Face models on one device: a private update is what a float64 loop over rows makes it, or the model is refused."""

import re

import pytest

from fsdp_dp import UnsupportedModelError
from tests.agreement import assert_exact, private_update
from tests.models.adapters import ADAPTED
from tests.models.variants import VARIANTS
from tests.models.zoo import MODELS, REFUSED

# torch on its own vmap: weight norm, in Wav2Vec2's positions, has no batching rule.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@pytest.mark.parametrize("name", MODELS)
def test_update_is_the_oracles(name: str) -> None:
    assert_exact(MODELS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_update_of_a_variant_is_the_oracles(name: str) -> None:
    assert_exact(VARIANTS[name])


@pytest.mark.parametrize("name", ADAPTED)
def test_update_of_a_part_is_the_oracles(name: str) -> None:
    assert_exact(ADAPTED[name])


@pytest.mark.parametrize("name", ["GPT-2", "T5", "BERT, classes", "ViT"])
def test_rows_one_by_one(name: str) -> None:
    assert_exact(MODELS[name], microbatch=1)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    subject, told = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=re.escape(told)):
        private_update(subject, bound=1.0)
