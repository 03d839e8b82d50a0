"""A sweep as a whole: what is refused before any trial starts, and at the end what all of them cost in privacy together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from fsdp_dp.ledger import LEDGER_FILE
from fsdp_dp.training.run_folder import CONFIG_FILE


class ComposedCost(Callback):
    """Hydra calls it (conf/config.yaml), in the process that starts the sweep, whichever launcher runs the trials."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the cost of the sweep; a rank of torchrun other than the first is silent."""
        if os.environ.get("RANK", "0") == "0" and not {"plan", "audit"} & set(config):
            print(*summary(Path(config.hydra.sweep.dir)), sep="\n", flush=True)


def summary(folder: Path) -> list[str]:
    """What the runs in a sweep's folder cost together, or why that cannot be said."""
    # Imported late: they take a second, and Hydra makes the callback for every command.
    from fsdp_dp.accounting import AccountingError
    from fsdp_dp.composition import cost
    from fsdp_dp.reporting.run import read_run

    runs = runs_in(folder)
    if not runs:
        return [f"no run is in {folder}: `python -m fsdp_dp.sweep cost RUN...` says what runs elsewhere cost together"]
    try:
        lines = cost([read_run(run) for run in runs], delta=None)
    except (ValueError, AccountingError) as error:
        return [f"the {len(runs)} runs in {folder}: no cost of all together can be stated. {error}"]
    return [f"the {len(runs)} runs in {folder}, to choose among which is to see all of them:", *lines]


def runs_in(folder: Path) -> list[Path]:
    """Every folder below that has a run's configuration or its ledger, at whatever depth `hydra.sweep.subdir` puts them."""
    found = {path.parent for name in (CONFIG_FILE, LEDGER_FILE) for path in folder.rglob(name)}
    return sorted(found, key=lambda run: (len(str(run)), str(run)))
