"""The `Trainer` example on one device, and what it says of privacy. On two ranks: `test_sharded.py`."""

import dataclasses
from pathlib import Path

import pytest

from fsdp_dp import PrivacyError
from tests.models.examples import PRIVACY, SGD, TOLERANCE, expected, hf_trainer, moved
from tests.oracle import relative_error


def test_trainer_on_one_device_trains_as_the_oracle_does(tmp_path: Path) -> None:
    trainer = hf_trainer.train(PRIVACY, str(tmp_path), use_cpu=True, **SGD)
    after = {name: p.detach() for name, p in trainer.model.named_parameters()}
    assert relative_error(moved(after), expected()) <= TOLERANCE


def test_trainer_is_accounted(tmp_path: Path) -> None:
    privacy = dataclasses.replace(PRIVACY, noise_multiplier=1.0, expected_batch_size=2, steps=3)
    trainer = hf_trainer.train(privacy, str(tmp_path), use_cpu=True)
    assert trainer.engine.steps == trainer.state.global_step == 3
    assert trainer.engine.vouched
    assert 0 < trainer.engine.epsilon() < float("inf")


def test_the_trainers_count_of_labels_is_refused(tmp_path: Path) -> None:
    """The `Trainer` as it is divides by the number of labels in the batch."""

    class Counting(hf_trainer.PrivateTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):  # type: ignore[no-untyped-def]
            count = (inputs["labels"] != -100).sum()
            return super().compute_loss(model, inputs, num_items_in_batch=count)

    counting = Counting(
        hf_trainer.make_model(),
        hf_trainer.TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True),
        train_dataset=hf_trainer.dataset(PRIVACY.dataset_size),
        privacy=PRIVACY,
    )
    with pytest.raises(PrivacyError, match=r"num_items_in_batch=.*counted from the batch"):
        counting.train()
