"""The examples in `scripts/examples`, run for one step without noise over all rows; `accelerate` is told to shard on CPUs."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from fsdp_dp import PrivacyConfig, per_sample_cross_entropy
from tests.agreement import Subject, expected_update
from tests.distributed.backends import whole_parameters
from tests.oracle import Gradients, relative_error

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "examples"))

import accelerate_fsdp
import hf_trainer

ROWS, BOUND = 6, 0.7
PRIVACY = PrivacyConfig(
    noise_multiplier=0.0, max_grad_norm=BOUND, expected_batch_size=ROWS, dataset_size=ROWS, target_delta=1e-2, steps=1
)
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
TOLERANCE = 2e-3  # the examples are in float32, whose certified norms are a little longer


@contextlib.contextmanager
def sharding_on_cpu() -> Iterator[None]:
    """`accelerate` takes its FSDP plugin for GPUs only, and calls the CPU "cpu:0", where FSDP1 wants "cpu"."""
    made = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        PartialState._shared_state["device"] = self.device = torch.device("cpu")
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init
    rank, size = dist.get_rank(), dist.get_world_size()
    before = dict(os.environ)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT="1", OMP_NUM_THREADS="1")  # the process group exists: nothing is opened there
    try:
        yield
    finally:
        AcceleratorState.__init__ = made
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True, kw_only=True)
class Example:
    """How far one step of SGD with a learning rate of 1 moves the parameters of an example."""

    script: str
    version: int

    def run(self) -> Gradients:
        with sharding_on_cpu():
            if self.script == "accelerate":
                accelerator = Accelerator(cpu=True, fsdp_plugin=accelerate_fsdp.plugin(self.version))
                model, engine = accelerate_fsdp.train(accelerator, PRIVACY, torch.optim.SGD, 1.0)
            else:
                model, engine = self._trained()
            assert engine.steps == 1
            return moved(whole_parameters(model))

    def _trained(self) -> tuple[Any, Any]:
        arguments = hf_trainer.fsdp_arguments(self.version)
        if self.version == 1:  # from rank 0's memory is for GPUs
            arguments["fsdp_config"] |= {"sync_module_states": "false", "cpu_ram_efficient_loading": "false"}
        with tempfile.TemporaryDirectory() as folder:
            trainer = hf_trainer.train(PRIVACY, folder, use_cpu=True, **SGD, **arguments)
        return trainer.model_wrapped, trainer.engine

    def error(self, found: Gradients) -> float:
        """In tolerances."""
        return relative_error(found, expected()) / TOLERANCE


def moved(after: Gradients) -> Gradients:
    before = dict(hf_trainer.make_model().named_parameters())
    return {name: (before[name].detach() - p) * ROWS for name, p in after.items()}


@functools.cache
def expected() -> Gradients:
    """Both examples train one model on one data set."""
    ids = torch.stack(accelerate_fsdp.dataset(ROWS))
    subject = Subject(
        model=hf_trainer.make_model,
        batch=lambda: {"input_ids": ids},
        losses=lambda outputs, batch: per_sample_cross_entropy(outputs.logits[:, :-1], batch["input_ids"][:, 1:]),
    )
    return expected_update(subject, BOUND)[0]
