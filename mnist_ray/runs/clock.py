"""Where a job's seconds go."""

from __future__ import annotations

import time

from mnist_ray.training.events import EpochFinished, Event, Started


class Clock:
    """Counts the seconds of a job's parts, from its creation on."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._parts: dict[str, float] = {}
        self._has_trained = False

    def mark(self, name: str) -> None:
        """Count the time since the last mark as that of ``name``."""
        now = time.perf_counter()
        self._parts[name] = self._parts.get(name, 0.0) + now - self._last
        self._last = now

    def note(self, event: Event) -> None:
        """Tell the start from the training, and that from the wait for the last validation."""
        if isinstance(event, Started) and not self._has_trained:
            self._has_trained = True
            self.mark("start")
        if isinstance(event, EpochFinished):
            self.mark("training")

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part, and in all."""
        parts = {name: round(seconds, 3) for name, seconds in self._parts.items()}
        return {**parts, "total": round(self._last - self._start, 3)}
