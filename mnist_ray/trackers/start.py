"""Starts a run's trackers, always including TensorBoard. A tracker that fails warns once; training continues."""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mnist_ray.config import OutputConfig
from mnist_ray.errors import first_line
from mnist_ray.storage import RunFolder
from mnist_ray.text import redact
from mnist_ray.trackers import Ending, Tracker
from mnist_ray.training.events import Event
from mnist_ray.workload import user_code
from mnist_ray.workload.base import Workload

Create = Callable[[], Tracker]
_CLOSE_TIMEOUT_S = 60.0


class Trackers:
    """Passes a run's events to trackers in a thread, so that a slow server does not delay the training."""

    def __init__(self, create: Mapping[str, Create], warn: Callable[[str], None]) -> None:
        self._create, self._warn = create, warn
        self._trackers: dict[str, Tracker] = {}
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
        for name, create in self._create.items():
            with self._dropped_if_failing(name):
                self._trackers[name] = create()
        while not isinstance(item := self._todo.get(), Ending):
            for name, tracker in list(self._trackers.items()):
                with self._dropped_if_failing(name):
                    tracker.log(item)
        for name, tracker in list(self._trackers.items()):
            with self._dropped_if_failing(name):
                tracker.close(item)

    @contextlib.contextmanager
    def _dropped_if_failing(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # a tracker may be the user's code
            self._trackers.pop(name, None)
            self._warn(f"{name} failed and is no longer used: {first_line(error)}")


def start(
    run: RunFolder,
    workload: Workload,
    settings: Mapping[str, Any],
    output: OutputConfig,
    warn: Callable[[str], None],
) -> Trackers:
    """Track a run in TensorBoard, and with the trackers of ``--tracker``."""
    plain = {
        name: value if isinstance(value, (bool, int, float)) else redact(value) for name, value in settings.items()
    }
    create: dict[str, Create] = {}
    sources = [user_code.find_with_arguments(call, Tracker) for call in ("tensorboard", *output.tracker)]
    for source in dict.fromkeys(sources):
        own = user_code.load(source, Tracker)
        number = sum(name.split()[0] == own.__name__ for name in create) + 1
        name = own.__name__ if number == 1 else f"{own.__name__} ({number})"
        create[name] = functools.partial(user_code.create, source, Tracker, run, workload, plain)
    return Trackers(create, warn)
