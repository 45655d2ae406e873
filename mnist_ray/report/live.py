"""A run's report while it goes on: written again and again beside the training, so that one can watch it."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable

_EVERY_S = 30.0  # at the most


class LiveReport:
    """Writes a report in a thread of its own, whenever it is asked to, but not for half a minute after the last."""

    def __init__(self, write: Callable[[], object]) -> None:
        self._write = write
        self._next = time.monotonic() + _EVERY_S
        self._thread: threading.Thread | None = None

    def refresh(self) -> None:
        """Write it soon, unless it is being written or was so just now."""
        if time.monotonic() > self._next and not (self._thread and self._thread.is_alive()):
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Wait for what is being written; nothing is written any more."""
        if self._thread is not None:
            self._thread.join()
        self._next = math.inf

    def _work(self) -> None:
        with contextlib.suppress(Exception):  # the last report, which the run ends with, says what is wrong
            self._write()
        self._next = time.monotonic() + _EVERY_S
