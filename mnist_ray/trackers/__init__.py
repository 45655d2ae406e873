"""The base class of trackers, which follow a run: TensorBoard, and the user's own (``--tracker FILE.py``)."""

from __future__ import annotations

import re
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
        """Return an event's values as (name, value, step), where steps are counted over all epochs.

        ``train/loss`` is that of each step; other values of ``train/`` are of the steps since the last event. At an
        epoch's end, ``epoch/`` has means over the epoch, and ``val/`` the validation. ``time/`` are fractions of the
        workers' time.
        """
        match event:
            case Progress():
                first = event.total_step - len(event.losses) + 1
                losses = [("train/loss", loss, first + number) for number, loss in enumerate(event.losses)]
                values = {_named("train", name): value for name, value in figures_of(event).items()}
                values |= {f"time/{part}": share for part, share in event.shares.items()}
                del values["train/loss"]
                values["epoch"] = event.epoch - 1 + event.step / event.epoch_steps
                return [*losses, *((name, value, event.total_step) for name, value in values.items())]
            case EpochFinished(last):
                return [(_named("epoch", name), value, last.total_step) for name, value in figures_of(event).items()]
            case Validated():
                return [(_named("val", name), value, event.total_step) for name, value in figures_of(event).items()]
        return []

    def final(self, ending: Ending) -> dict[str, float]:
        """Return the loss and metrics on the test set, such as ``test/loss``; empty if the run did not finish."""
        result = ending.result or {}
        known = (name for name in result.get("formats", ()) if name.startswith("test_"))
        return {_named("test", name): result[name] for name in known if result.get(name) is not None}


def _named(part: str, figure: str) -> str:
    """Return a figure's name for trackers: ``train_loss`` and ``val_loss`` are ``train/loss`` and ``val/loss``."""
    return f"{part}/{re.sub('^(train|val|test)_', '', figure)}"
