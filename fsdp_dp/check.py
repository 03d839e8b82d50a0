"""The command `python -m fsdp_dp.check`: can the model, loss and data of a configuration be trained privately?

It takes the configuration of `fsdp_dp.train`, runs in one process, and looks at the model before it is sharded. It ends
with 0 if nothing is refused, with 1 otherwise, and with 2 over a bad configuration.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fsdp_dp.train import checked, refuse, run_command
from fsdp_dp.training.config_errors import explain
from fsdp_dp.training.schema import TrainConfig

if TYPE_CHECKING:
    from fsdp_dp.verdict import Verdict

ROWS = 8


def check_job(config: DictConfig) -> None:
    """Print the verdict and end with its exit code."""
    try:
        train_config = checked(config, world_size=config.sharding.tensor_parallel_size)
        verdict = verdict_on(train_config)
    except (ValueError, OmegaConfBaseException) as error:
        refuse(explain(error), "check")
    print(verdict, flush=True)
    sys.exit(0 if verdict.ok else 1)


def verdict_on(config: TrainConfig) -> Verdict:
    """The verdict on the model as it starts, with the loss of training and the first rows of the data."""
    import torch

    from fsdp_dp.data.corpus import load_corpus
    from fsdp_dp.models.build import build
    from fsdp_dp.models.objective import row_losses
    from fsdp_dp.training.world import choose_device
    from fsdp_dp.verdict import check_private

    device = choose_device(config.device)
    rows = load_corpus(config.data, config.model).train
    torch.manual_seed(config.seed)
    model = build(config.model).to(device)
    batch = tuple(x.to(device) for x in rows.batch(torch.arange(min(ROWS, len(rows)))))
    return check_private(model, batch, lambda m, b: row_losses(m(b[0]), b[1]).mean())


if __name__ == "__main__":
    run_command(check_job, "check")
