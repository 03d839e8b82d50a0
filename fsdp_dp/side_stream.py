"""Work beside the main stream of a GPU, and transfers that the host does not wait for.

Norms are taken beside backward, under whatever leaves the GPU idle. On a CPU there are no streams and everything is done
where it is said. Tensors made beside are read on the main stream only after `join`; tensors of the main stream that are
read beside must be kept until then.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class SideStream:
    """One stream beside the current one of a device."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._beside = nullcontext() if self._stream is None else _Beside(self._stream)

    def beside(self) -> AbstractContextManager[None]:
        """What is launched inside runs after all that the current stream was given so far, and beside what it gets next.

        Entered for every FSDP unit of every backward, one at a time.
        """
        return self._beside

    def join(self) -> None:
        """Let the current stream wait for all that was launched beside it."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class _Beside(AbstractContextManager[None]):
    """As ``stream.wait_stream(current)`` and ``torch.cuda.stream(stream)``, with one event for all times."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream, self._event = stream, torch.cuda.Event()
        self._main = stream

    def __enter__(self) -> None:
        self._main = torch.cuda.current_stream(self._stream.device)
        self._event.record(self._main)
        self._stream.wait_event(self._event)
        torch.cuda.set_stream(self._stream)

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_stream(self._main)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` there; from pageable memory the host would wait until the GPU has done all that it was given before."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
