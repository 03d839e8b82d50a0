"""Signals that end a run after the step under way, saved, instead of in the middle of one.

Ctrl-C and SIGTERM end it for now; SIGUSR1, which Slurm sends ahead of a time limit or a preemption, asks besides for an
exit code that means "start me again".
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# torchrun passes on the terminal's signal, so one Ctrl-C arrives twice.
SECONDS_OF_ONE_PRESS = 2.0
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop, and to be started again."""

    def __init__(self) -> None:
        self.at: float | None = None
        self.requeue = False

    @property
    def made(self) -> bool:
        return self.at is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; a second Ctrl-C, later, interrupts at once."""
        if number == signal.SIGINT and self.at is not None and time.monotonic() - self.at > SECONDS_OF_ONE_PRESS:
            raise KeyboardInterrupt
        self.requeue |= number == signal.SIGUSR1
        self.at = self.at or time.monotonic()


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While inside, the signals are noted instead of obeyed; after an exception SIGTERM and SIGUSR1 still are.

    Whoever started the ranks sends SIGTERM to all when one has ended, and this one has yet to say why it ends.
    """
    request = StopRequest()
    before = {number: signal.signal(number, request.handle) for number in HANDLED}
    try:
        yield request
    except BaseException:
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        raise
    for number, handler in before.items():
        signal.signal(number, handler)
