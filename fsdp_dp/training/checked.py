"""A composed configuration, checked: OmegaConf's nodes go in, frozen dataclasses come out. No torch here."""

from __future__ import annotations

import os

from omegaconf import DictConfig, OmegaConf

from fsdp_dp.training.schema import TrainConfig, check_world


def writable_schema(kind: type[TrainConfig] = TrainConfig) -> DictConfig:
    """The schema as a node that YAML files and overrides may fill in: OmegaConf makes frozen dataclasses read-only."""
    schema = OmegaConf.structured(kind)
    for node in (schema, *schema.values()):
        if isinstance(node, DictConfig):
            OmegaConf.set_readonly(node, None)
    return schema


def checked(config: DictConfig, world_size: int | None = None) -> TrainConfig:
    """The configuration as the dataclasses of the schema, for this number of processes (default: those that there are).

    Raises:
        ValueError: a value is not allowed.
        OmegaConfBaseException: a key is unknown; merging into the schema finds those that `+key=value` added.
    """
    known = OmegaConf.merge(writable_schema(), OmegaConf.to_container(config))
    train_config = OmegaConf.to_object(known)
    assert isinstance(train_config, TrainConfig)
    check_world(train_config, int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size)
    return train_config
