"""Small tables of numbers that a kernel reads from the device, sent once."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fsdp_dp.side_stream import to_device

Rows = tuple[tuple[int, ...], ...]


class Table:
    """Rows of numbers that whoever keeps the table asks for again and again."""

    __slots__ = ("_sent", "rows")

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._sent: dict[tuple[torch.device, int], Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """``[n, m]`` int64 on the device; to be read on the current stream."""
        place = device, _stream(device)
        found = self._sent.get(place)
        if found is None:
            found = self._sent[place] = to_device(torch.tensor(self.rows, dtype=torch.int64), device)
        return found


def table(rows: Rows, device: torch.device) -> Tensor:
    """`Table.on`, of rows that are made anew each time, and mostly the same."""
    return _table(rows).on(device)


@functools.lru_cache(maxsize=1024)
def _table(rows: Rows) -> Table:
    return Table(rows)


class _Tickets:
    """Zeros on a device, one for each launch on a stream, cleared again when all have been used."""

    def __init__(self, device: torch.device) -> None:
        self._whole = torch.zeros(_LAUNCHES, 4, dtype=torch.int32, device=device)  # 16 bytes each
        self._each, self._used = self._whole.unbind(), 0

    def next(self) -> Tensor:
        if self._used == _LAUNCHES:
            self._whole.zero_()
            self._used = 0
        self._used += 1
        return self._each[self._used - 1]


_LAUNCHES = 1024


def tickets(device: torch.device) -> Tensor:
    """An int32 that is zero when a launch on the current stream begins, from which its programs may draw numbers."""
    return _tickets(device, _stream(device)).next()


@functools.cache
def _tickets(device: torch.device, stream: int) -> _Tickets:
    return _Tickets(device)


def _stream(device: torch.device) -> int:
    """What ``torch.cuda.current_stream(device).cuda_stream`` says, without a `torch.cuda.Stream` made for it."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(torch._C._cuda_getCurrentRawStream(index))
