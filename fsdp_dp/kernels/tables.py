"""Small tables of numbers that a kernel reads from the device, sent once."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fsdp_dp.side_stream import to_device

Rows = tuple[tuple[int, ...], ...]


def table(rows: Rows, device: torch.device) -> Tensor:
    """``[n, m]`` int64 on the device, of what a step asks for again and again; to be read on the current stream."""
    return _table(rows, device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)


@functools.lru_cache(maxsize=1024)
def _table(rows: Rows, device: torch.device, stream: int) -> Tensor:
    return to_device(torch.tensor(rows, dtype=torch.int64), device)
