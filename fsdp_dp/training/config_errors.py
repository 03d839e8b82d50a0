"""Turns an error of the configuration into one message: the option, what was found, what is allowed."""

from __future__ import annotations

import dataclasses

from fsdp_dp.config import AdaptiveBounds
from fsdp_dp.training.schema import TrainConfig


def explain(error: Exception) -> str:
    """What to tell the user about an error of the configuration or of Hydra.

    Hydra and OmegaConf name the key; what they leave out, and this adds, is which keys or which type are allowed.
    """
    cause = error.__cause__ or error
    message = str(error).split("\nConfig search path:")[0].split("\nSet the environment variable")[0].strip()
    key = getattr(cause, "full_key", None)
    if not key:
        return message
    if "not in" in str(cause):
        return f"{key}: no such option; expected {allowed_keys(key, getattr(cause, 'object_type', None))}"
    return f"{key}: {getattr(cause, 'msg', None) or cause}".split("\n")[0]


def allowed_keys(key: str, parent: object) -> str:
    """The options that stand where `key` was looked for: those of its parent, a dataclass, or of the whole."""
    if key.startswith("hydra."):
        return f"one of those that `--cfg hydra --package {key.rpartition('.')[0]}` prints"
    if key.startswith("clipping.adaptive."):
        known = ", ".join(f"clipping.adaptive.{field.name}" for field in dataclasses.fields(AdaptiveBounds))
        return f"one of {known}, with clipping=adaptive"
    if not (isinstance(parent, type) and dataclasses.is_dataclass(parent)):
        parent = TrainConfig
    prefix = "" if issubclass(parent, TrainConfig) else f"{key.rpartition('.')[0]}."
    return "one of " + ", ".join(prefix + field.name for field in dataclasses.fields(parent))
