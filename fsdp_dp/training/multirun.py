"""A sweep as a whole: what is refused before any trial starts, and at the end what all of them cost in privacy together."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from fsdp_dp.training.run_folder import CONFIG_FILE


class ComposedCost(Callback):
    """Hydra calls it (conf/config.yaml), in the process that starts the sweep, whichever launcher runs the trials."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the cost of the sweep; a rank of torchrun other than the first is silent."""
        if os.environ.get("RANK", "0") == "0" and not {"plan", "audit"} & set(config):
            print(*summary(Path(config.hydra.sweep.dir)), sep="\n", flush=True)


def summary(folder: Path) -> list[str]:
    """What the runs in a sweep's folder cost together, or why that cannot be said, and the command that says it later."""
    from fsdp_dp.sweep import cost

    trials = sorted((path.parent for path in folder.glob(f"*/{CONFIG_FILE}")), key=lambda path: int(path.name))
    return trials
