"""ZeRO-1: `ZeroRedundancyOptimizer`, whose state is split over ranks, with a state that checkpoints can ask for."""

from __future__ import annotations

import warnings
from typing import Any

import torch.distributed as dist

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # the package scripts optimizers with torch.jit as it loads
    from torch.distributed.optim import ZeroRedundancyOptimizer


class Zero1(ZeroRedundancyOptimizer):
    """Each rank keeps and updates the state of some parameters, and sends these parameters to the others."""

    @property
    def state(self) -> Any:
        """This rank's part: whether there is any tells torch's checkpoint helpers that none needs to be made up."""
        return self.optim.state if hasattr(self, "optim") else {}

    @state.setter
    def state(self, value: Any) -> None:
        """The local optimizer keeps it."""

    def state_dict(self) -> dict[str, Any]:
        """The state of all parameters, gathered on every rank. To be called on all of them."""
        found: dict[str, Any] = {}
        for rank in range(dist.get_world_size(self.process_group)):
            self.consolidate_state_dict(to=rank)
            if rank == self.rank:
                found = super().state_dict()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base class, which knows parameters by number; torch's checkpoint helpers know them by name."""
        groups = state_dict["param_groups"]
        number = {key: i for i, key in enumerate(key for group in groups for key in group["params"])}
        super().load_state_dict(
            {
                "state": {number[key]: value for key, value in state_dict["state"].items()},
                "param_groups": [{**group, "params": [number[key] for key in group["params"]]} for group in groups],
            }
        )
        for parameter in [p for p in self.optim.state if self._param_to_rank[p] != self.rank]:  # type: ignore[attr-defined]
            del self.optim.state[parameter]  # kept by another rank; saving would look for it in this one's groups
