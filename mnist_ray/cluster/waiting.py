"""Reports what a job waits for."""

from __future__ import annotations

import time
from collections.abc import Callable

import ray

_SAID_AFTER_S, _SAID_EVERY_S = 30.0, 300.0  # a start takes up to 20 s


class Waiting:
    """Reports, after 30 s and then every 5 min, what a job waits for and which resources are unreserved."""

    def __init__(self, needed: str, say: Callable[[str], object]) -> None:
        self._needed, self._say = needed, say
        self.look(is_waiting=False)

    def look(self, *, is_waiting: bool = True) -> None:
        """Report the wait if it is time; if the job does not wait now, restart the clock."""
        if not is_waiting:
            self._since, self._said_after_s = time.monotonic(), _SAID_AFTER_S
        elif (waited_s := time.monotonic() - self._since) > self._said_after_s:
            self._said_after_s = waited_s + _SAID_EVERY_S
            there, free = ray.cluster_resources(), ray.available_resources()
            parts = [f"{free.get(name, 0):g} of {there[name]:g} {name}s" for name in ("CPU", "GPU") if name in there]
            self._say(f"waiting for {self._needed}: {' and '.join(parts)} are unreserved ({waited_s:.0f} s)")
