"""A job but for its console, files and evaluation: what comes through the driver, and when."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mnist_ray.training.events import EpochFinished, Event, Started


@dataclass(frozen=True)
class Heard:
    """All that a run has told."""

    events: list[tuple[float, Event]]
    """With the seconds since the beginning of the job."""
    end_s: float
    """When the last checkpoint was safe."""

    def times(self, kind: type[Event]) -> list[float]:
        """Return when events of a kind have come."""
        return [when for when, event in self.events if isinstance(event, kind)]

    @property
    def epochs(self) -> list[EpochFinished]:
        """The ends of all epochs."""
        return [event for _, event in self.events if isinstance(event, EpochFinished)]

    @property
    def trained_s(self) -> float:
        """Seconds of training of all epochs."""
        return sum(epoch.last.epoch_s for epoch in self.epochs)

    @property
    def stopped_s(self) -> float:
        """Seconds from the first attempt's start to the last epoch's end in which nothing was trained."""
        return self.times(EpochFinished)[-1] - self.times(Started)[0] - self.trained_s


def run_job(flags: Mapping[str, object], on_event: Callable[[Event], None] = lambda event: None) -> Heard:
    """Train as ``jobs/train.py`` would with these flags."""
    begun = time.monotonic()
    sys.argv[1:] = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    from mnist_ray.run.job import read_job
    from mnist_ray.run.session import Session, load_data

    with Session(read_job(), "mnist_ray.run.fit") as session:
        session.job, session.data = load_data(session.job)
        with session.ray():
            from mnist_ray.run.fit import fit

            seen: list[tuple[float, Any]] = []

            def note(event: Event) -> None:
                seen.append((time.monotonic() - begun, event))
                on_event(event)

            fit(session, note)
            return Heard(seen, time.monotonic() - begun)
