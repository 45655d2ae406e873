"""The seconds of each part of a job."""

from __future__ import annotations

import time

from mnist_ray.training.events import EpochFinished, Event, Started, Validated


class Clock:
    """Measures the seconds of each part of a job, from the creation of the clock on."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._parts: dict[str, float] = {}
        self._has_trained = False

    def mark(self, name: str) -> None:
        """Add the time since the last mark to the part ``name``."""
        now = time.perf_counter()
        self._parts[name] = self._parts.get(name, 0.0) + now - self._last
        self._last = now

    def note(self, event: Event) -> None:
        """Mark the end of the start, of an epoch's training, and of its validation."""
        if isinstance(event, Started) and not self._has_trained:
            self._has_trained = True
            self.mark("start")
        if isinstance(event, (EpochFinished, Validated)):
            self.mark("training")
        if isinstance(event, Validated):  # events of a short epoch come together
            own = min(event.seconds, self._parts["training"])
            self._parts["training"] -= own
            self._parts["validation"] = self._parts.get("validation", 0.0) + own

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part, and the total."""
        parts = {name: round(seconds, 3) for name, seconds in self._parts.items()}
        return {**parts, "total": round(self._last - self._start, 3)}
