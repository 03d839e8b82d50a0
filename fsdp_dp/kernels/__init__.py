"""Triton kernels, each beside its torch reference. Importing this package loads neither torch nor Triton."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["available"]


def available(device: torch.device) -> bool:
    """Whether the kernels run on `device`: a CUDA device of a machine that has Triton; elsewhere torch does the work."""
    return device.type == "cuda" and _triton_is_installed()


@functools.cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
