"""The secret keys of one engine: in memory only, the same on all ranks, new at every attachment and load (rule 5)."""

from __future__ import annotations

import os
import warnings

from fsdp_dp import noise
from fsdp_dp.errors import PrivacyError
from fsdp_dp.releases import SEED_WARNING
from fsdp_dp.sharding.base import ShardedModel


class Keys:
    """Drawn from system entropy on rank 0, or made from ``seed`` (tests only).

    Args:
        after: releases so far, so that a seed's keys differ after a load.

    Attributes:
        noise: of the gradients' noise.
        bounds: of the noise on the counts of adaptive bounds.
    """

    def __init__(self, model: ShardedModel, seed: int | None, after: int) -> None:
        if seed is None:
            self._master = model.agree(noise.new_key())
        else:
            warnings.warn(SEED_WARNING, stacklevel=6)
            self._master = noise.key_from_seed(seed)
            if after:
                self._master = noise.derive_key(self._master, f"after release {after}")
        self._process = os.getpid()
        self.noise = noise.derive_key(self._master, "noise")
        self.bounds = noise.derive_key(self._master, "adaptive bounds")

    def of_loader(self, number: int) -> bytes:
        """For the draws of one loader."""
        return noise.derive_key(self._master, f"sampling {number}")

    def refuse_fork(self) -> None:
        """Raises PrivacyError in a process that was forked off, whose parent has the same keys."""
        if os.getpid() != self._process:
            raise PrivacyError(
                f"optimizer.step() in process {os.getpid()}, which was forked off {self._process} after make_private: both "
                "hold the same keys and would draw the same noise. Call make_private in the process that trains, or go on "
                "with fresh keys: engine.load_state_dict(engine.state_dict())"
            )
