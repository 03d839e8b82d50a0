"""The Hugging Face `Trainer`, private: logical batches from the engine's loader, and a loss for each row.

    python scripts/examples/hf_trainer.py
    torchrun --standalone --nproc-per-node=2 scripts/examples/hf_trainer.py --fsdp-version 2

The second needs a GPU for each rank: without, the `Trainer` refuses FSDP ("only works in distributed training").

`PrivateTrainer` changes three things. A step is one logical batch, however many microbatches that has. The `Trainer`
counts the labels of a batch and divides by their number; that couples rows, so the count is left out. The engine is
attached once the `Trainer` has wrapped the model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from fsdp_dp import PrivacyConfig, PrivacyEngine, make_private, per_sample_cross_entropy

VOCABULARY, LENGTH = 64, 16


class _Attach(TrainerCallback):
    def __init__(self, trainer: PrivateTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer.engine = make_private(trainer.model_wrapped, trainer.privacy, trainer.optimizer)


class PrivateTrainer(Trainer):
    """Takes the arguments of `Trainer`; ``compute_loss_func(outputs, labels, **_)`` is the mean over rows of their losses."""

    engine: PrivacyEngine

    def __init__(self, *args: Any, privacy: PrivacyConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.privacy = privacy
        self.add_callback(_Attach(self))

    def get_train_dataloader(self) -> Any:
        return _LogicalBatches(self)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], None]:
        return [next(epoch_iterator)], None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        total = torch.zeros((), device=self.args.device)
        for microbatch in inputs:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(microbatch))
            self.accelerator.backward(loss)
            total += loss.detach()
        self.engine.privatize()  # here, since the Trainer logs the norm of the gradients: it is that of private ones
        return total

    def floating_point_ops(self, inputs: Any) -> int:
        return 0


class _LogicalBatches:
    """What the `Trainer` takes for its data loader: the engine's, which is there when the first epoch begins."""

    def __init__(self, trainer: PrivateTrainer) -> None:
        self._trainer = trainer

    def __len__(self) -> int:
        return self._trainer.args.max_steps

    def __iter__(self) -> Iterator[Any]:
        trainer, args = self._trainer, self._trainer.args
        size = args.per_device_train_batch_size
        return iter(
            trainer.engine.loader(trainer.train_dataset, size, steps=len(self), collate_fn=trainer.data_collator)
        )


def next_token_loss(outputs: Any, labels: Tensor, **_: Any) -> Tensor:
    return per_sample_cross_entropy(outputs.logits[:, :-1], labels[:, 1:]).mean()


def dataset(rows: int) -> list[dict[str, Tensor]]:
    """Sequences that count up, from anywhere; each token is its own label."""
    starts = torch.randint(VOCABULARY, (rows, 1), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids} for ids in (starts + torch.arange(LENGTH)) % VOCABULARY]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**size, **dropout, bos_token_id=0, eos_token_id=0))


def train(privacy: PrivacyConfig, output_dir: str, **arguments: Any) -> PrivateTrainer:
    defaults = {
        "max_steps": privacy.steps,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "max_grad_norm": 0,  # rows are clipped already
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = PrivateTrainer(
        make_model(),
        TrainingArguments(output_dir, **(defaults | arguments)),
        train_dataset=dataset(privacy.dataset_size),
        compute_loss_func=next_token_loss,
        privacy=privacy,
    )
    trainer.train()
    return trainer


def fsdp_arguments(version: int) -> dict[str, Any]:
    config = {"version": version, "transformer_layer_cls_to_wrap": ["GPT2Block"], "use_orig_params": True}
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": config}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp-version", type=int, choices=(1, 2))
    version = parser.parse_args().fsdp_version
    privacy = PrivacyConfig(
        target_epsilon=8.0, target_delta=1e-4, max_grad_norm=1.0, expected_batch_size=64, dataset_size=512, steps=20
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(privacy, folder, **(fsdp_arguments(version) if version else {}))
    print(f"epsilon <= {trainer.engine.epsilon():.2f} after {trainer.engine.steps} steps")


if __name__ == "__main__":
    main()
