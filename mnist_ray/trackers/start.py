"""Starts a run's trackers, always including TensorBoard. A tracker that fails warns once; training continues."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from pyarrow import fs
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from mnist_ray.config import OutputConfig
from mnist_ray.errors import first_line
from mnist_ray.storage import RunFolder
from mnist_ray.text import redact
from mnist_ray.trackers import Ending, Tracker
from mnist_ray.training.events import Event, Progress, Started
from mnist_ray.workload import user_code
from mnist_ray.workload.base import Workload

Create = Callable[[], Tracker]
_CLOSE_TIMEOUT_S = 60.0
_RESTART = event_pb2.SessionLog(status=event_pb2.SessionLog.START)


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
    """Track a run in TensorBoard, and with the user's trackers."""
    plain = {
        name: value if isinstance(value, (bool, int, float)) else redact(value) for name, value in settings.items()
    }
    create: dict[str, Create] = {"TensorBoard": functools.partial(TensorBoard, run, workload, plain)}
    for call in output.tracker:
        source = user_code.find_with_arguments(call, Tracker)
        own = user_code.load(source, Tracker)
        number = sum(name.split()[0] == own.__name__ for name in create) + 1
        name = own.__name__ if number == 1 else f"{own.__name__} ({number})"
        create[name] = functools.partial(user_code.create, source, Tracker, run, workload, plain)
    return Trackers(create, warn)


class TensorBoard(Tracker):
    """An event file in the run's folder. If the folder is not on a local disk, the file is uploaded at the end."""

    def __init__(self, run: RunFolder, workload: Workload, settings: Mapping[str, Any]) -> None:
        super().__init__(run, workload, settings)
        is_local = isinstance(run.filesystem, fs.LocalFileSystem)
        self._elsewhere = None if is_local else tempfile.TemporaryDirectory()
        self._folder = self._elsewhere.name if self._elsewhere else run.path
        os.makedirs(self._folder, exist_ok=True)
        # tensorboardX's writer without its thread, so that a full disk raises here.
        self._file = event_file_writer.EventsWriter(f"{self._folder}/events", f".{time.time_ns()}")

    def _write(self, **content: Any) -> None:
        self._file.write_event(event_pb2.Event(wall_time=time.time(), **content))

    def log(self, event: Event) -> None:
        """Write an event's values. TensorBoard hides what an earlier attempt logged for repeated steps."""
        if isinstance(event, Started):
            self._write(step=event.total_step + 1, session_log=_RESTART)
        for name, value, step in self.scalars(event):
            if not math.isnan(value):
                self._write(step=step, summary=summary.scalar(name, value))
        if not isinstance(event, Progress):  # too frequent to flush
            self._file.flush()

    def close(self, ending: Ending) -> None:
        """Write the settings, the test metrics and the images."""
        final = self.final(ending)
        scalars = [summary.scalar(name, value) for name, value in final.items()]
        for line in (*summary.hparams(self.settings, final), *scalars):
            self._write(summary=line)
        for name, png in ending.pictures.items():
            width, height = Image.open(io.BytesIO(png)).size
            image = summary.Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
            self._write(summary=summary.Summary(value=[summary.Summary.Value(tag=name, image=image)]))
        self._file.close()
        if self._elsewhere:
            self.run.write_files({path.name: [path.read_bytes()] for path in Path(self._folder).iterdir()})
            self._elsewhere.cleanup()
