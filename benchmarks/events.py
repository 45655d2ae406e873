"""Run a training job without console, files and evaluation, and record its events."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mnist_ray.training.events import EpochFinished, Event, Started


@dataclass(frozen=True)
class Heard:
    """The events of a run."""

    events: list[tuple[float, Event]]
    """Each with the seconds since the job started."""
    end_s: float
    """Seconds from the job's start until its last checkpoint was stored."""

    def times(self, kind: type[Event]) -> list[float]:
        """Return the times of all events of a kind."""
        return [when for when, event in self.events if isinstance(event, kind)]

    @property
    def epochs(self) -> list[EpochFinished]:
        """The events at the ends of epochs."""
        return [event for _, event in self.events if isinstance(event, EpochFinished)]

    @property
    def trained_s(self) -> float:
        """Training seconds of all epochs."""
        return sum(epoch.last.epoch_s for epoch in self.epochs)

    @property
    def stopped_s(self) -> float:
        """Seconds without training, between the workers' first start and the end of the last epoch."""
        return self.times(EpochFinished)[-1] - self.times(Started)[0] - self.trained_s


def run_job(flags: Mapping[str, object], on_event: Callable[[Event], None] = lambda event: None) -> Heard:
    """Train like ``jobs/train.py`` with these flags; ``on_event`` is called with each event."""
    begun = time.monotonic()
    sys.argv[1:] = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    from mnist_ray.run.job import read_job
    from mnist_ray.run.session import check_against_data, connected, console_of, load_splits, started

    job = read_job()
    with started(job, "mnist_ray.run.fit") as start:
        data = load_splits(job)
        job = check_against_data(job, data)
        with connected(start, job, data, console_of(job)) as session:
            from mnist_ray.run.fit import fit, plan

            seen: list[tuple[float, Any]] = []

            def note(event: Event) -> None:
                seen.append((time.monotonic() - begun, event))
                on_event(event)

            fit(session, plan(session), note)
            return Heard(seen, time.monotonic() - begun)
