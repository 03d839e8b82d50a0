"""Hugging Face models, adapters and examples on two ranks, under FSDP1 and FSDP2: the same update as on one device."""

import functools
from typing import Any

import pytest

from tests.agreement import expected_update
from tests.distributed.backends import played
from tests.models.adapters import ADAPTED
from tests.models.examples import Example
from tests.models.sharded import SHARDINGS, SUBJECTS, Update
from tests.models.zoo import MODELS
from tests.oracle import Gradients, relative_error

# One of each kind: tied and untied heads, custom norms, an encoder, an encoder and decoder, patches, windows, weights that
# the program reads itself.
IN_CI = (
    "GPT-2",
    "Llama",
    "BERT",
    "Mamba",
    "DeBERTa",
    "T5",
    "Swin",
    "GPT-2, its own loss",
    "LoRA on all Linears",
    "BiTFiT",
)
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@functools.cache
def expected(name: str) -> tuple[Gradients, float]:
    return expected_update(SUBJECTS[name])


def updates(names: Any) -> list[Update]:
    return [
        Update(model=name, sharding=sharding, bound=expected(name)[1], empty_last=sharding == "FSDP2")
        for name in names
        for sharding in SHARDINGS
    ]


def disagreements(found: dict[Any, Any]) -> list[str]:
    """Updates that are not the oracle's."""
    errors = {task: task.error(moved) for task, moved in found.items() if isinstance(task, Example)}
    errors |= {
        task: relative_error(moved, expected(task.model)[0]) / SUBJECTS[task.model].tolerance
        for task, moved in found.items()
        if isinstance(task, Update)
    }
    return [f"{error:.1e} times the tolerance: {task}" for task, error in errors.items() if not error <= 1]


EXAMPLES = [Example(script=script, version=version) for script in ("accelerate", "trainer") for version in (1, 2)]
results = functools.cache(lambda: played(2, [*updates(IN_CI), *EXAMPLES]))


def test_updates_are_the_oracles() -> None:
    assert disagreements({task: moved for task, moved in results().items() if isinstance(task, Update)}) == []


def test_examples_train_as_the_oracle_does() -> None:
    assert disagreements({task: moved for task, moved in results().items() if isinstance(task, Example)}) == []


@pytest.mark.slow
@pytest.mark.parametrize("names", [[*MODELS], [*ADAPTED]], ids=["models", "adapters"])
def test_every_update_is_the_oracles(names: list[str]) -> None:
    assert disagreements(played(2, updates(names))) == []
