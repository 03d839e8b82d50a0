"""The command `python -m fsdp_dp.train`: reads the configuration, checks it, and hands it to the application.

Hydra and OmegaConf end here. A bad option ends the program with its name and the allowed values before torch's process
group starts; an exception later ends every rank with the message of the one that failed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fsdp_dp.models.config import MODELS, ModelConfig, model_class
from fsdp_dp.training import launchers
from fsdp_dp.training.config_errors import explain
from fsdp_dp.training.schema import TrainConfig, check_world
from fsdp_dp.training.trial import is_task, run_trial

T = TypeVar("T", bound=TrainConfig)

EXIT_BAD_CONFIGURATION, EXIT_FAILED_TRIAL = 2, 1
# Hydra's options that print something and end, which one rank does for all.
SHOWN = frozenset(("--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i"))
# How long other ranks give rank 0 to say what is wrong, so that it is said once.
SECONDS_FOR_RANK_0 = 5


def config_folder() -> str:
    """The folder of `config.yaml`: in the checkout that this file belongs to, else in the installed package.

    Hydra's `pkg://fsdp_dp.conf` cannot find a checkout that is not installed.
    """
    package = Path(__file__).resolve().parent
    checkout = package.parent
    in_checkout = (checkout / "setup.cfg").is_file() and (checkout / "conf" / "config.yaml").is_file()
    return str(checkout / "conf" if in_checkout else package / "conf")


def store_schema(kind: type[TrainConfig] = TrainConfig) -> None:
    """Register with Hydra the schema, and as choices of `model` the options of each architecture, which YAML files extend."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=writable_schema(kind))
    for name, options in MODELS.items():
        node = writable(options)
        node.architecture = name
        if "options" in node:  # of another library: any key is allowed
            OmegaConf.set_struct(node.options, False)
        store.store(group="model", name=name, node=node)


def writable_schema(kind: type[TrainConfig] = TrainConfig, model: type[ModelConfig] = ModelConfig) -> DictConfig:
    """The schema as a node that YAML files and overrides may fill in; `model` says which options a model has."""
    schema = writable(kind)
    schema.model = writable(model)
    return schema


def writable(of: Any) -> DictConfig:
    """A dataclass as a node: OmegaConf makes frozen ones read-only."""
    schema = OmegaConf.structured(of)
    parts = [schema[name] for name in schema if not OmegaConf.is_missing(schema, name)]
    for node in (schema, *parts):
        if isinstance(node, DictConfig):
            OmegaConf.set_readonly(node, None)
    return schema


def typed(config: DictConfig, kind: type[T]) -> T:
    """The configuration as a dataclass.

    Raises:
        ValueError: a value is not allowed.
        OmegaConfBaseException: a key is unknown; merging into the schema finds those that `+key=value` added.
    """
    schema = writable_schema(kind, model_class(config.model.architecture))
    found = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.to_container(config)))
    assert isinstance(found, kind)
    return found


def checked(config: DictConfig, world_size: int | None = None) -> TrainConfig:
    """The configuration as the dataclasses of the schema, for this number of processes (default: those that there are).

    Raises:
        ValueError, OmegaConfBaseException: as `typed`.
    """
    train_config = typed(config, TrainConfig)
    check_world(train_config, int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size)
    return train_config


def run_job(config: DictConfig) -> None:
    """Check the configuration, read the data, then train; a task of submitit's has torchrun do that."""
    config = in_the_sweeps_folder(config)
    if is_task():
        run_trial(config, checked)
        return
    try:
        train_config = checked(config)
        # Imported late: torch takes seconds, and --help or a wrong option should not.
        from fsdp_dp.training.app import prepare, run_or_end

        plan = prepare(train_config)
    except (ValueError, OmegaConfBaseException) as error:
        refuse(explain(error))
    run_or_end(plan)


def in_the_sweeps_folder(config: DictConfig) -> DictConfig:
    """A trial of a sweep has its run directory in the sweep's, unless output_dir says otherwise."""
    if not HydraConfig.initialized() or OmegaConf.is_missing(HydraConfig.get().job, "num") or config.output_dir:
        return config
    merged = OmegaConf.merge(config, {"output_dir": HydraConfig.get().runtime.output_dir})
    assert isinstance(merged, DictConfig)
    return merged


def refuse(message: str, command: str = "train") -> NoReturn:
    """End the program over a bad configuration; on several ranks, rank 0 says why."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(SECONDS_FOR_RANK_0)
    print(f"fsdp_dp.{command}: {message}", file=sys.stderr, flush=True)
    sys.exit(EXIT_BAD_CONFIGURATION)


def main() -> None:
    """The entry point of `python -m fsdp_dp.train` and of the console script."""
    run_command(run_job)


def run_command(
    job: Callable[[DictConfig], None], command: str = "train", kind: type[TrainConfig] = TrainConfig
) -> None:
    """Have Hydra read the configuration, of this kind, for the job of a command; a bad one ends the program."""
    # Hydra then raises instead of printing, and `explain` can add what is allowed.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if command != "train":
        sys.argv.insert(1, f"hydra/help=fsdp_dp_{command}")
    store_schema(kind)
    launchers.register()
    if os.environ.get("RANK", "0") != "0":
        if SHOWN.intersection(sys.argv):
            return
        # Each rank of torchrun makes a sweep's folder, named by its own clock: the runs are in that of rank 0.
        sys.argv.insert(1, "hydra.sweep.dir=outputs/multirun/.other_ranks")
    try:
        hydra.main(version_base="1.3", config_path=config_folder(), config_name="config")(job)()
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        refuse(launchers.hint(explain(error)), command)
    except RuntimeError as error:
        if not launchers.is_of_a_trial(error):
            raise
        print(f"fsdp_dp.{command}: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_FAILED_TRIAL)


if __name__ == "__main__":
    main()
