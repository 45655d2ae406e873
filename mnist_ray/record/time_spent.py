"""Where the workers' time went: a line at the end of a run, and notes on what has slowed the training."""

from __future__ import annotations

import math

from mnist_ray.training import stopwatch
from mnist_ray.training.events import Event, Progress, Saved, seconds_of
from mnist_ray.training.stopwatch import PARTS

_MIN_SHOWN = 0.01  # of the time
_MIN_NOTED_S = 5.0  # less is no reason for a note
_SLOW = {  # by the part: the share of the time from which on it is noted, its name, and what helps
    stopwatch.DATA: (0.15, "waiting for data", "more --loader-workers read ahead, unless the storage is slow"),
    stopwatch.CHECKPOINTS: (0.05, "checkpoints", "the state is large: use --checkpoint-every, or longer epochs"),
    stopwatch.STORAGE: (0.05, "checkpoints", "the storage is slow: use --checkpoint-every, or longer epochs"),
    stopwatch.CALLBACKS: (0.15, "callbacks", "do their work less often"),
}


class TimeSpent:
    """The mean seconds of a worker by part, since this job has started."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._has_noted = False

    def add(self, event: Event) -> None:
        """Add an event's seconds."""
        if isinstance(event, (Progress, Saved)):
            more = seconds_of(event)
            for part in PARTS:
                self._seconds[part] += more.get(f"{part}_s", 0.0)

    @property
    def shares(self) -> str:
        """What fraction of the time each part took, the largest first: ``compute 71%, other workers 18%``."""
        total = math.fsum(self._seconds.values())
        shown = {part: value / total for part, value in self._seconds.items() if value >= _MIN_SHOWN * total > 0}
        largest_first = sorted(shown.items(), key=lambda item: -item[1])
        return ", ".join(f"{PARTS[part]} {share:.0%}" for part, share in largest_first)

    def new_notes(self) -> list[str]:
        """Return a line for each cause of slow training, with its remedy; none if it was called before with success."""
        if self._has_noted:
            return []
        total = math.fsum(self._seconds.values())
        notes = [
            f"{name} took {self._seconds[part] / total:.0%} of the time ({self._seconds[part]:.1f} s): {remedy}"
            for part, (share, name, remedy) in _SLOW.items()
            if self._seconds[part] > max(share * total, _MIN_NOTED_S)
        ]
        self._has_noted = len(notes) > 0
        return notes
