"""Logs runs for TensorBoard, always: an event file in the run's folder."""

from __future__ import annotations

import io
import math
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from pyarrow import fs
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from mnist_ray.storage import RunFolder
from mnist_ray.trackers import Ending, Tracker
from mnist_ray.training.events import Event, Progress, Started
from mnist_ray.workload.base import Workload

_RESTART = event_pb2.SessionLog(status=event_pb2.SessionLog.START)


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
