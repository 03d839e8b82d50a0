"""torchtitan's trainer, private: its model, parallelism, optimizer, schedule, checkpoints and metrics; only the step changes.

    torchrun --standalone --nproc-per-node=8 scripts/examples/torchtitan_trainer.py \
        --model.name=private_llama3 --model.flavor=debugmodel --training.steps=100 \
        --training.local_batch_size=8 --training.global_batch_size=256 --training.seq_len=512

Written for torchtitan 0.2. `MODEL` and `rows` are yours to replace: the rows have to be a map-style dataset, since epsilon
depends on how they are drawn, and torchtitan's own datasets are streams.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from torchtitan.components.dataloader import BaseDataLoader, DataloaderExhaustedError
from torchtitan.config import JobConfig
from torchtitan.distributed import utils as dist_utils
from torchtitan.models.llama3 import get_train_spec
from torchtitan.protocols.train_spec import register_train_spec
from torchtitan.train import Trainer, main

from fsdp_dp import PrivacyConfig, make_private, per_sample_cross_entropy
from fsdp_dp.ledger import Ledger

MODEL = "private_llama3"
ROWS, VOCABULARY = 10_000, 2048
LEASE = 20  # releases that a crash may cost: as many as count as made when it comes


class Rows(Dataset[Tensor], BaseDataLoader):
    """Sequences that count up, from anywhere: ``[seq_len + 1]`` token ids a row. It has no state: the engine draws."""

    def __init__(self, length: int) -> None:
        starts = torch.randint(VOCABULARY, (ROWS, 1), generator=torch.Generator().manual_seed(0))
        self.ids = (starts + torch.arange(length + 1)) % VOCABULARY

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> Tensor:
        return self.ids[row]

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("rows are drawn by the engine's loader")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


class PrivateTrainer(Trainer):
    """What is torchtitan's stays; the loader, the loss and the step are the engine's."""

    def __init__(self, job_config: JobConfig) -> None:
        super().__init__(job_config)
        (model,), (optimizer,) = self.model_parts, self.optimizers  # no pipeline parallelism
        training = job_config.training
        batch_size = training.global_batch_size if training.global_batch_size > 0 else training.local_batch_size
        privacy = PrivacyConfig(
            target_epsilon=8.0,
            target_delta=1e-6,
            max_grad_norm=1.0,
            expected_batch_size=batch_size,
            dataset_size=len(self.dataloader),
            steps=training.steps,
        )
        # Last, as for any FSDP2 model: after parallelize_fn and the optimizer.
        self.engine = make_private(model, privacy, optimizer)
        # A checkpoint knows of the releases before it. Those between it and a crash count too: the ledger knows.
        self.ledger = Ledger(Path(job_config.job.dump_folder) / "ledger.jsonl") if dist.get_rank() == 0 else None
        counted = [0]
        if self.ledger is not None:
            self.ledger.begin(privacy, self.engine.noise_multiplier, lease=LEASE)
            counted = [self.ledger.counted]
        dist.broadcast_object_list(counted, src=0, device=self.device)
        self.engine.load_state_dict(self.engine.state_dict() | {"steps": counted[0]})

    def batch_generator(self, data_iterable: Iterable[Any]) -> Iterator[Any]:
        """Logical batches, each an iterable of microbatches of `local_batch_size` rows a rank, until the budget is spent."""
        training = self.job_config.training
        for logical_batch in self.engine.loader(data_iterable, microbatch_size=training.local_batch_size):
            if self.engine.steps == training.steps:  # releases that a crash lost count too
                break
            yield logical_batch
        raise DataloaderExhaustedError

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        """One release. No gradient clipping, and no division by the number of tokens: both would look at the data."""
        started, losses = time.perf_counter(), []
        logical_batch = next(data_iterator)
        self.metrics_processor.data_loading_times.append(time.perf_counter() - started)
        if self.ledger is not None and not self.ledger.covers(self.engine.steps + 1):
            self.ledger.reserve(self.engine.steps)
        for ids in logical_batch:
            ids = ids.to(self.device)
            with self.train_context(), self.maybe_enable_amp:
                losses_B = per_sample_cross_entropy(self.model_parts[0](ids[:, :-1]), ids[:, 1:])
            losses_B.mean().backward()
            losses.append(losses_B.detach().mean())
            self.ntokens_seen += ids.numel()
            self.metrics_processor.ntokens_since_last_log += ids.numel()
        self.checkpointer.maybe_wait_for_staging()
        self.optimizers.step()
        self.lr_schedulers.step()
        self.optimizers.zero_grad()
        if self.metrics_processor.should_log(self.step):
            mesh = self.parallel_dims.get_optional_mesh("loss")
            loss = torch.stack(losses).mean()  # of real and padded rows: for people, and not private
            mean, most = dist_utils.dist_mean(loss, mesh), dist_utils.dist_max(loss, mesh)
            self.metrics_processor.log(self.step, mean, most, 0.0, extra_metrics={"epsilon": self.engine.epsilon()})

    def train(self) -> None:
        super().train()
        if self.ledger is not None:
            self.ledger.close(self.engine.steps)

    def state_dict(self) -> dict[str, Any]:
        """The count of releases is saved with the step."""
        return super().state_dict() | {"privacy": self.engine.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.engine.load_state_dict(state["privacy"])


def register() -> None:
    """llama3 with rows of one's own."""

    def build_rows(*, job_config: JobConfig, **_: Any) -> Rows:
        return Rows(job_config.training.seq_len)

    register_train_spec(
        MODEL,
        replace(get_train_spec(), build_dataloader_fn=build_rows, build_tokenizer_fn=None, build_validator_fn=None),
    )


if __name__ == "__main__":
    register()
    main(PrivateTrainer)
