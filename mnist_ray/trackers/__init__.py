"""Trackers follow a run. Their base class; TensorBoard; and the user's own (``--tracker FILE.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mnist_ray.storage import RunFolder
from mnist_ray.training.events import EpochFinished, Event, Progress, Validated
from mnist_ray.workload.base import Workload
from mnist_ray.workload.user_code import UserClass


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    result: dict[str, Any] | None  # result.json; None if the run did not finish
    pictures: Mapping[str, bytes]  # PNGs of the report, by name
    checkpoint: RunFolder | None  # the tested checkpoint


class Tracker(UserClass):
    """Follows one run, in a thread of the driver. A tracker that raises is dropped with a warning; training continues.

    A resumed run gets a new tracker, whose first event is ``Started`` with the step from which the run resumes; drop
    what an earlier tracker wrote of later steps. An epoch has two events: ``EpochFinished`` and, once it is validated,
    ``Validated``. ``RunFolder`` can replace a file, but not append to it: object stores cannot. Values may be NaN.
    """

    follows_trials: ClassVar[bool] = False
    """Whether the tracker also follows the search of a sweep, whose events are ``TrialEnded``."""

    def __init__(self, run: RunFolder, workload: Workload, settings: Mapping[str, Any]) -> None:
        """Start to follow ``run``; ``settings`` are the values in its config.json, as numbers and strings."""
        self.run, self.workload, self.settings = run, workload, settings

    def log(self, event: Event) -> None:
        """Handle an event; ``scalars`` returns its values."""

    def close(self, ending: Ending) -> None:
        """Handle the end of the run."""

    def scalars(self, event: Event) -> list[tuple[str, float, int]]:
        """Return an event's values as (name, value, step): ``step/…`` by training step, ``epoch/…`` by epoch.

        ``time/…``, by step: the fractions of the workers' time.
        """
        match event:
            case Progress():
                first = event.total_step - len(event.losses) + 1
                losses = [("step/train_loss", loss, first + number) for number, loss in enumerate(event.losses)]
                metrics = {name: value for name, value in event.window.items() if name != "loss"}
                measured = [(f"step/train_{name}", value, event.total_step) for name, value in metrics.items()]
                measured += [(f"time/{part}", share, event.total_step) for part, share in event.shares.items()]
                return [*losses, *measured, ("step/learning_rate", event.learning_rate, event.total_step)]
            case EpochFinished(last):
                values = {f"train_{name}": value for name, value in last.so_far.items()}
                values |= {self.workload.rate: last.examples_per_s, "epoch_s": last.epoch_s}
                return [(f"epoch/{name}", value, last.epoch) for name, value in values.items()]
            case Validated():
                values = {f"val_{name}": value for name, value in event.values.items()} | {"val_s": event.seconds}
                return [(f"epoch/{name}", value, event.epoch) for name, value in values.items()]
        return []

    def final(self, ending: Ending) -> dict[str, float]:
        """Return the test metrics as ``final/…``; empty if the run did not finish."""
        if ending.result is None:
            return {}
        names = [*(f"test_{metric.name}" for metric in self.workload.all_metrics), self.workload.rate]
        return {f"final/{name}": ending.result[name] for name in names if ending.result.get(name) is not None}
