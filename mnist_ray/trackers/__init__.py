"""Trackers, which follow a run: TensorBoard always, and those of ``--tracker``, built in or the user's own."""

from __future__ import annotations

import contextlib
import functools
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mnist_ray.errors import first_line
from mnist_ray.storage import RunFolder
from mnist_ray.text import redact
from mnist_ray.training.events import EpochFinished, Event, Progress, Validated, figures_of
from mnist_ray.workload import user_code
from mnist_ray.workload.base import Workload

_CLOSE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    result: dict[str, Any] | None  # result.json; None if the run was not tested
    pictures: Mapping[str, bytes]  # the report's PNGs, by name
    has_failed: bool = False


class Tracker(user_code.UserClass):
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
        """Return the evaluation's loss and metrics, such as ``test/loss``; empty if the run did not finish."""
        result = ending.result or {}
        evaluated = result.get("evaluated", "test")  # the best checkpoint's, of which curves do not show the validation
        known = (name for name in result.get("formats", ()) if name.startswith(f"{evaluated}_"))
        part = "test" if evaluated == "test" else "best"
        return {_named(part, name): result[name] for name in known if result.get(name) is not None}


def _named(part: str, figure: str) -> str:
    """Return a figure's name for trackers: ``train_loss`` and ``val_loss`` are ``train/loss`` and ``val/loss``."""
    return f"{part}/{re.sub('^(train|val|test)_', '', figure)}"


class Trackers:
    """Passes a run's events to trackers in a thread, so that a slow server does not delay the training."""

    def __init__(self, create: Sequence[tuple[str, Callable[[], Tracker]]], warn: Callable[[str], None]) -> None:
        self._create, self._warn = create, warn
        self._todo: queue.Queue[Event | Ending] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def log(self, event: Event) -> None:
        """Pass an event to the trackers, without waiting."""
        self._todo.put(event)

    def close(self, ending: Ending) -> None:
        """Pass the run's end to the trackers, and wait for them for at most a minute."""
        self._todo.put(ending)
        self._thread.join(_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self._warn(f"tracking has not finished after {_CLOSE_TIMEOUT_S:.0f} s; continuing without it")

    def _work(self) -> None:
        trackers = list[tuple[str, Tracker]]()
        for name, create in self._create:
            with self._warned(name):
                trackers.append((name, create()))
        item: Event | Ending | None = None
        while not isinstance(item, Ending):
            item = self._todo.get()
            left = []
            for name, tracker in trackers:
                with self._warned(name):
                    if isinstance(item, Ending):
                        tracker.close(item)
                    else:
                        tracker.log(item)
                    left.append((name, tracker))
            trackers = left

    @contextlib.contextmanager
    def _warned(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # a tracker may be the user's code
            self._warn(f"{name} failed and is no longer used: {first_line(error)}")


def start(
    run: RunFolder,
    workload: Workload,
    settings: Mapping[str, Any],
    references: Sequence[str],
    warn: Callable[[str], None],
) -> Trackers:
    """Track a run in TensorBoard, and with the trackers of ``--tracker``, which ``references`` name."""
    numbers = (bool, int, float)
    plain = {name: value if isinstance(value, numbers) else redact(value) for name, value in settings.items()}
    sources = [user_code.find_with_arguments(reference, Tracker) for reference in ("tensorboard", *references)]
    create = []
    for source in dict.fromkeys(sources):
        name = user_code.load(source, Tracker).__name__
        create.append((name, functools.partial(user_code.create, source, Tracker, run, workload, plain)))
    return Trackers(create, warn)
