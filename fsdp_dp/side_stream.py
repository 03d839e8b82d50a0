"""Work beside the main stream of a GPU, and transfers that the host does not wait for.

Norms are taken beside backward, under whatever leaves the GPU idle. On a CPU there are no streams and everything is done
where it is said. Tensors made beside are read on the main stream only after `join`; tensors of the main stream that are
read beside must be kept until then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SideStream:
    """One stream beside the current one of a device."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched inside runs after all that the current stream was given so far, and beside what it gets next."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for all that was launched beside it."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` there; from pageable memory the host would wait until the GPU has done all that it was given before."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
