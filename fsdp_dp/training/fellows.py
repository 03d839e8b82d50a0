"""When one rank fails, all end, and all name the same cause: the failure that came first.

A rank that fails leaves its message in the ranks' common store before it exits. A thread of every other rank looks there
once a second, for its main thread may wait in a collective that nobody will join.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_FOR_THE_LAST_LOOK = 10.0
_KEY = "first failure"


class Fellows:
    """The ranks of one run, as far as their failures go."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank = store, rank

    def first_failure(self, message: str) -> str | None:
        """Tell the others that this rank fails with `message`; another rank's message if that one failed first.

        The first stays for a moment, so that the others can look: the store may be in this very process.
        """
        mine = f"rank {self._rank}: {message}"
        try:
            first = self._store.compare_set(_KEY, "", mine).decode(errors="replace")
        except RuntimeError:  # the store was in a process that is gone
            return None
        if first != mine:
            return first
        time.sleep(2 * SECONDS_BETWEEN_LOOKS)
        return None

    @contextmanager
    def watched(self, end: Callable[[str], None]) -> Iterator[None]:
        """While inside, `end(message)` is called, in a thread, when another rank has failed."""
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over, end), name="fellows", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            # A look at the store that outlives the interpreter aborts a process that had done its work.
            thread.join(SECONDS_FOR_THE_LAST_LOOK)

    def _watch(self, over: threading.Event, end: Callable[[str], None]) -> None:
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            try:
                if not self._store.check([_KEY]):
                    continue
                message = self._store.get(_KEY).decode(errors="replace")
            except RuntimeError:  # the store is gone: so is the run, and the main thread will see it
                return
            if not message.startswith(f"rank {self._rank}:"):
                end(message)
            return
