"""`hydra/launcher=submitit_slurm` and `submitit_local`, with values that fit a training run instead of the plugin's own.

The options and their names are those of hydra-submitit-launcher (`pip install 'fsdp_dp[slurm]'`): hydra.launcher.<option>.
"""

from __future__ import annotations

from dataclasses import replace

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from fsdp_dp.training.trial import TrialError

PLUGIN = "hydra-submitit-launcher"
MINUTES_OF_A_DAY = 1440
SETUP = [
    # A node that fails ends the trial: the others would wait for it in a collective.
    "export SLURM_KILL_BAD_EXIT=1",
    # srun does not take this from sbatch since Slurm 22.05.
    '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK',
]


def register() -> None:
    """Store both launchers where Hydra looks for them; without the plugin, none."""
    Plugins.instance()  # loads the plugins, which store their own values: ours have to come after
    try:
        from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf
    except ImportError:
        return
    # One torchrun a node (tasks_per_node) starts a process for each GPU; the sizes are those of scripts/slurm/train.sbatch.
    slurm = replace(
        SlurmQueueConf(), name="fsdp_dp", gpus_per_node=8, cpus_per_task=64, timeout_min=MINUTES_OF_A_DAY,
        stderr_to_stdout=True, setup=SETUP, additional_parameters={"requeue": True},
        max_num_timeout=1000,  # requeues at a time limit
    )  # fmt: skip
    local = replace(LocalQueueConf(), name="fsdp_dp", timeout_min=MINUTES_OF_A_DAY, stderr_to_stdout=True)
    for name, node in (("submitit_slurm", slurm), ("submitit_local", local)):
        ConfigStore.instance().store(group="hydra/launcher", name=name, node=node, provider="fsdp_dp")


def is_of_a_trial(error: RuntimeError) -> bool:
    """Whether its message alone is for people: a trial failed, was cancelled or could not be submitted."""
    return isinstance(error, TrialError) or type(error).__module__.startswith("submitit.")


def hint(message: str) -> str:
    """Hydra's message, and what to install where it found no such launcher."""
    missing = "Could not find 'hydra/launcher/submitit" in message
    return f"{message}\nThese launchers come with {PLUGIN}: pip install 'fsdp_dp[slurm]'" if missing else message
