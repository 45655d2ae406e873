"""Where the workers' time went: a line at the end of a run, and notes on what has slowed the training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from mnist_ray.training import stopwatch
from mnist_ray.training.events import Event, Progress, Saved, Started
from mnist_ray.training.stopwatch import PARTS

_MIN_SHOWN = 0.01  # of the time
_MIN_NOTED_S = 5.0  # less is no reason for a note
_MAX_WAIT, _MAX_FACTOR = 0.15, 1.4  # of the time that workers wait for a slower one; its time over theirs
_MAX_EXCHANGE = 0.4  # of the time that even the slowest worker waits for the others
_SLOW = {  # by the part: the share of the time from which on it is noted, its name, and what helps
    stopwatch.DATA: (0.15, "waiting for data", "more --loader-workers read ahead, unless the storage is slow"),
    stopwatch.CHECKPOINTS: (0.05, "checkpoints", "the state is large: use --checkpoint-every, or longer epochs"),
    stopwatch.STORAGE: (0.05, "checkpoints", "the storage is slow: use --checkpoint-every, or longer epochs"),
    stopwatch.CALLBACKS: (0.15, "callbacks", "do their work less often"),
}


class TimeSpent:
    """The seconds of each worker, since this job has started."""

    def __init__(self) -> None:
        self.of_workers: list[dict[str, float]] = []  # seconds of each of PARTS
        self.hosts: Sequence[str] = ()  # of the workers, in the last attempt
        self._has_noted = False

    def add(self, event: Event) -> None:
        """Add an event's seconds."""
        match event:
            case Started():
                self.hosts = event.hosts
            case Progress() | Saved():
                self.of_workers += [dict.fromkeys(PARTS, 0.0) for _ in event.parts[len(self.of_workers) :]]
                for own, seconds in zip(self.of_workers, event.parts, strict=False):  # an elastic run may have fewer
                    for part, more in zip(PARTS, seconds, strict=True):
                        own[part] += more

    @property
    def shares(self) -> str:
        """What fraction of the time each part took, the largest first: ``compute 71%, other workers 18%``."""
        seconds, total = self._means()
        shown = {part: value / total for part, value in seconds.items() if value >= _MIN_SHOWN * total > 0}
        largest_first = sorted(shown.items(), key=lambda item: -item[1])
        return ", ".join(f"{PARTS[part]} {share:.0%}" for part, share in largest_first)

    def new_notes(self) -> list[str]:
        """Return a line for each cause of slow training, with its remedy; none if it was called before with success."""
        if self._has_noted or not self.of_workers:
            return []
        seconds, total = self._means()
        notes = [
            f"{name} took {seconds[part] / total:.0%} of the time ({seconds[part]:.1f} s): {remedy}"
            for part, (share, name, remedy) in _SLOW.items()
            if seconds[part] > max(share * total, _MIN_NOTED_S)
        ]
        notes += self._note_on_workers(total) if len(self.of_workers) > 1 else []
        self._has_noted = len(notes) > 0
        return notes

    def _means(self) -> tuple[Mapping[str, float], float]:
        """Return the mean seconds of a worker, by part, and their sum."""
        seconds = {part: statistics.fmean(own[part] for own in self.of_workers) for part in PARTS}
        return seconds, math.fsum(seconds.values())

    def _note_on_workers(self, total: float) -> list[str]:
        """Return a note if all wait for one slow worker, or if the gradients take long even for the slowest."""
        workers = self.of_workers
        slowest = min(range(len(workers)), key=lambda number: workers[number][stopwatch.WORKERS])
        others = [own for own in workers if own is not workers[slowest]]
        own_wait_s = workers[slowest][stopwatch.WORKERS]
        wait_s = statistics.fmean(own[stopwatch.WORKERS] for own in others) - own_wait_s
        busy_s = [own[stopwatch.DATA] + own[stopwatch.COMPUTE] for own in (workers[slowest], *others)]
        factor = busy_s[0] / max(statistics.median(busy_s[1:]), 1e-9)
        if wait_s > max(_MAX_WAIT * total, _MIN_NOTED_S) and factor > _MAX_FACTOR:
            where = f" on {self.hosts[slowest]}" if len(self.hosts) == len(workers) else ""
            slow = f"it is {factor:.1f} times as slow as they are; look for other load on its machine"
            return [f"the other workers wait {wait_s / total:.0%} of the time for worker {slowest}{where}: {slow}"]
        if own_wait_s > max(_MAX_EXCHANGE * total, _MIN_NOTED_S):
            share = f"{own_wait_s / total:.0%} of the time"
            return [f"all workers wait for gradients {share}: use a larger --batch-size, or fewer --num-workers"]
        return []
