"""The base class of trackers, which follow a run: TensorBoard, and the user's own (``--tracker FILE.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mnist_ray.storage import RunFolder
from mnist_ray.training.events import EpochFinished, Event, Progress, Validated, figures_of
from mnist_ray.workload.base import Workload
from mnist_ray.workload.user_code import UserClass


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    result: dict[str, Any] | None  # result.json; None if the run was not tested
    pictures: Mapping[str, bytes]  # the report's PNGs, by name
    checkpoint: RunFolder | None  # the tested checkpoint
    has_failed: bool = False


class Tracker(UserClass):
    """Follows one run, in a thread of the driver; of a job of many runs, each, where it is trained.

    A tracker that raises is dropped with a warning; training continues.

    A resumed run gets a new tracker, whose first event is ``Started`` with the step from which the run resumes; drop
    what an earlier tracker wrote for later steps. An epoch has two events: ``EpochFinished`` and, once it is validated,
    ``Validated``. ``RunFolder`` can replace a file, but not append to it: object stores cannot. Values may be NaN.
    """

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
                figures = figures_of(event).items()
                values = [(f"step/{name}", value) for name, value in figures if name != "train_loss"]
                values += [(f"time/{part}", share) for part, share in event.shares.items()]
                return [*losses, *((name, value, event.total_step) for name, value in values)]
            case EpochFinished() | Validated():
                epoch = event.last.epoch if isinstance(event, EpochFinished) else event.epoch
                return [(f"epoch/{name}", value, epoch) for name, value in figures_of(event).items()]
        return []

    def final(self, ending: Ending) -> dict[str, float]:
        """Return the test metrics as ``final/…``; empty if the run did not finish."""
        result = ending.result or {}
        return {f"final/{name}": result[name] for name in result.get("formats", ()) if result.get(name) is not None}
