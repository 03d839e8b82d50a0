"""Ctrl-C ends a run after the step under way, with its checkpoint and report, instead of in the middle of one."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# torchrun passes on the terminal's signal, so one Ctrl-C arrives twice.
SECONDS_OF_ONE_PRESS = 2.0


class StopRequest:
    """Whether the user has asked this process to stop."""

    def __init__(self) -> None:
        self.at: float | None = None

    @property
    def made(self) -> bool:
        return self.at is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the first Ctrl-C; a second one, later, interrupts at once."""
        if self.at is not None and time.monotonic() - self.at > SECONDS_OF_ONE_PRESS:
            raise KeyboardInterrupt
        self.at = self.at or time.monotonic()


@contextmanager
def stop_on_ctrl_c() -> Iterator[StopRequest]:
    """While inside, Ctrl-C is noted instead of raised."""
    request = StopRequest()
    before = signal.signal(signal.SIGINT, request.handle)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, before)
