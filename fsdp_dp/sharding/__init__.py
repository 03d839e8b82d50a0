"""How a model is split over ranks, behind one interface: the only place that knows FSDP's or DTensor's insides."""

from fsdp_dp.sharding.attach import open_model
from fsdp_dp.sharding.base import ManagedParameter, Region, ShardedModel

__all__ = ["ManagedParameter", "Region", "ShardedModel", "open_model"]
