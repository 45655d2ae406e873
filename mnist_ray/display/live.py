"""A run's report while it goes on: written again and again beside the training, so that one can watch it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

_MOST = 0.05  # of the time
_FIRST_S = 1.0  # what it is taken to need before it is known


class LiveReport:
    """Writes a report in a thread of its own, whenever it is asked to, but for no more than a twentieth of the time."""

    def __init__(self, write: Callable[[], object]) -> None:
        self._write = write
        self._took_s = _FIRST_S
        self._ended = time.monotonic()
        self._thread: threading.Thread | None = None

    def refresh(self) -> None:
        """Write it soon, unless it is being written or was so just now."""
        is_writing = self._thread is not None and self._thread.is_alive()
        if is_writing or time.monotonic() - self._ended < self._took_s / _MOST:
            return
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait for what is being written; nothing is written any more."""
        if self._thread is not None:
            self._thread.join()
        self._took_s = float("inf")

    def _work(self) -> None:
        start = time.monotonic()
        with contextlib.suppress(Exception):  # the last report, which the run ends with, says what is wrong
            self._write()
        self._ended = time.monotonic()
        self._took_s = self._ended - start
