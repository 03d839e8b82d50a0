"""Saving a run with torch.distributed.checkpoint: each rank writes its own shards, and the engine's counts go along.

No key, noise or un-noised sum is in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from fsdp_dp.engine import PrivacyEngine


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, engine: PrivacyEngine | None) -> None:
    """Write `model`, `optimizer` (where it has any state) and `privacy` under `folder`; to be called on every rank."""
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    # Asked for the state of an optimizer that has none, such as plain SGD, torch takes a step to make some.
    if optimizer.state:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    if engine is not None:
        state["privacy"] = engine.state_dict()
    dcp.save(state, checkpoint_id=str(folder))
