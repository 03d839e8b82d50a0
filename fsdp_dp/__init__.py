"""fsdp_dp: differentially private training on PyTorch FSDP.

    from fsdp_dp import PrivacyConfig, make_private

Importing the package loads no torch; the names below load it when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fsdp_dp.config import AdaptiveBounds, PrivacyConfig

if TYPE_CHECKING:
    from fsdp_dp.batch_norm import replace_batch_norm
    from fsdp_dp.engine import PrivacyEngine, make_private
    from fsdp_dp.errors import BudgetExceededError, NoEpsilonWarning, PrivacyError, UnsupportedModelError
    from fsdp_dp.losses import per_sample_cross_entropy
    from fsdp_dp.verdict import check_private
    from fsdp_dp.wrapper import FullyShardedDataParallel

__version__ = "0.1.0"

_HOME = {
    "PrivacyEngine": "fsdp_dp.engine",
    "make_private": "fsdp_dp.engine",
    "check_private": "fsdp_dp.verdict",
    "FullyShardedDataParallel": "fsdp_dp.wrapper",
    "BudgetExceededError": "fsdp_dp.errors",
    "NoEpsilonWarning": "fsdp_dp.errors",
    "PrivacyError": "fsdp_dp.errors",
    "UnsupportedModelError": "fsdp_dp.errors",
    "per_sample_cross_entropy": "fsdp_dp.losses",
    "replace_batch_norm": "fsdp_dp.batch_norm",
}

__all__ = [
    "AdaptiveBounds",
    "BudgetExceededError",
    "FullyShardedDataParallel",
    "NoEpsilonWarning",
    "PrivacyConfig",
    "PrivacyEngine",
    "PrivacyError",
    "UnsupportedModelError",
    "check_private",
    "make_private",
    "per_sample_cross_entropy",
    "replace_batch_norm",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fsdp_dp' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
