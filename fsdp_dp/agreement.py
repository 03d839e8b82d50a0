"""What the ranks of one engine must agree on before anything is released."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from typing import Any

from fsdp_dp import accounting
from fsdp_dp.config import PrivacyConfig
from fsdp_dp.sharding.base import ShardedModel


def what_ranks_share(model: ShardedModel, privacy: PrivacyConfig) -> dict[str, Any]:
    """For `ShardedModel.refuse_differences`: the options, and which parameters are trainable."""
    names = hashlib.sha256(repr([(p.name, p.numel) for p in model.parameters]).encode()).hexdigest()
    found = f"{len(model.parameters)}, {model.global_numel} elements, names {names[:8]}"
    options = {f"PrivacyConfig.{name}": value for name, value in dataclasses.asdict(privacy).items()}
    return {**options, "the list of trainable parameters": found}


def noise_multiplier(model: ShardedModel, privacy: PrivacyConfig) -> float:
    """Sigma, calibrated on rank 0 only, so that ranks cannot differ in the last digit; a failure there ends all ranks.

    Raises:
        AccountingError: the same on all ranks.
    """
    value, failure = 0.0, ""
    if model.is_first_rank:
        try:
            value = accounting.calibrate_for(privacy)
        except (ValueError, RuntimeError) as error:
            kind = "" if isinstance(error, accounting.AccountingError) else f"{type(error).__name__}: "
            failure = f"{kind}{error}"
    payload = model.agree(struct.pack("<d1024s", value, failure.encode()[:1024]))
    value, message = struct.unpack("<d1024s", payload)
    if message.strip(b"\0"):
        raise accounting.AccountingError(message.strip(b"\0").decode(errors="replace"))
    return float(value)
