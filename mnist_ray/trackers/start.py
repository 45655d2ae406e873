"""Who follows a run, and TensorBoard among them. One that fails warns once; training goes on."""

from __future__ import annotations

import functools
import importlib.util
import io
import queue
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
from PIL import Image
from pyarrow import fs

from mnist_ray.config import OutputConfig
from mnist_ray.errors import first_line, redact
from mnist_ray.storage import RunFolder
from mnist_ray.trackers.mlflow import MLflow
from mnist_ray.trackers.prometheus import RayMetrics
from mnist_ray.trackers.tracker import Ending, Tracker
from mnist_ray.trackers.wandb import WandB
from mnist_ray.training.events import Event, Started
from mnist_ray.workload import user_code
from mnist_ray.workload.base import Workload

_CLOSE_TIMEOUT_S = 60.0


class Trackers:
    """Hands on a run's events to trackers, in a thread of their own: a slow server holds nothing up."""

    def __init__(self, trackers: dict[str, Callable[[], Tracker]], warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._todo: queue.Queue[Event | Ending] = queue.Queue()
        self._thread = threading.Thread(target=self._work, args=(trackers,), daemon=True)
        self._thread.start()

    def log(self, event: Event) -> None:
        """Let the trackers write an event, soon."""
        self._todo.put(event)

    def close(self, ending: Ending) -> None:
        """Let the trackers write how the run ended, and wait for them; for a minute at most."""
        self._todo.put(ending)
        self._thread.join(_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self._warn(f"tracking is not done after {_CLOSE_TIMEOUT_S:.0f} s; left as it is")

    def _work(self, factories: dict[str, Callable[[], Tracker]]) -> None:
        trackers: dict[str, Tracker] = {}
        for name, create in factories.items():
            self._attempt(name, trackers, functools.partial(_create, name, create, trackers))
        while not isinstance(item := self._todo.get(), Ending):
            for name, tracker in list(trackers.items()):
                self._attempt(name, trackers, functools.partial(tracker.log, item))
        for name, tracker in list(trackers.items()):
            self._attempt(name, trackers, functools.partial(tracker.close, item))

    def _attempt(self, name: str, trackers: dict[str, Tracker], act: Callable[[], None]) -> None:
        """Do something with a tracker; where that fails, whatever the reason, warn and go on without it."""
        try:
            act()
        except Exception as error:
            trackers.pop(name, None)
            self._warn(f"{name} has failed and is left out from here on: {first_line(error)}")


def _create(name: str, create: Callable[[], Tracker], trackers: dict[str, Tracker]) -> None:
    trackers[name] = create()


def start(
    run: RunFolder,
    workload: Workload,
    settings: Mapping[str, Any],
    output: OutputConfig,
    warn: Callable[[str], None],
) -> Trackers:
    """Track a run in Ray's metrics, in TensorBoard, where that is installed, and where ``output`` says."""
    plain = _plain(settings)
    trackers: dict[str, Callable[[], Tracker]] = {}
    if ray.is_initialized():
        trackers["Ray's metrics"] = lambda: RayMetrics(run, workload, plain)
    if importlib.util.find_spec("tensorboard") is not None:
        trackers["TensorBoard"] = lambda: _TensorBoard(run, workload, plain)
    if (mlflow_uri := output.mlflow) is not None:
        trackers["MLflow"] = lambda: MLflow(run, workload, plain, mlflow_uri, warn)
    if (project := output.wandb) is not None:
        trackers["Weights & Biases"] = lambda: WandB(run, workload, plain, project)
    if output.tracker is not None:
        own = user_code.find(output.tracker, Tracker)
        trackers[own.__name__] = lambda: own(run, workload, plain)
    return Trackers(trackers, warn)


def start_trials(
    run: RunFolder, workload: Workload, settings: Mapping[str, Any], output: OutputConfig, warn: Callable[[str], None]
) -> Trackers:
    """Track a sweep's trials where ``output`` says so: in MLflow, which shows them within the sweep's run."""
    plain, trackers = _plain(settings), dict[str, Callable[[], Tracker]]()
    if (uri := output.mlflow) is not None:
        trackers["MLflow"] = lambda: MLflow(run, workload, plain, uri)
    return Trackers(trackers, warn)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if isinstance(value, (bool, int, float)) else redact(value) for name, value in settings.items()}


class _TensorBoard(Tracker):
    """Event files in the run's folder; on storage that is no local disk they are put there at the end."""

    def __init__(self, run: RunFolder, workload: Workload, settings: Mapping[str, Any]) -> None:
        super().__init__(run, workload, settings)
        is_local = isinstance(run.filesystem, fs.LocalFileSystem)
        self._elsewhere = None if is_local else tempfile.TemporaryDirectory()
        self._folder = self._elsewhere.name if self._elsewhere else run.path
        self._writer: Any = None
        _mute_writer_thread()

    def log(self, event: Event) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if isinstance(event, Started) and self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._writer is None:  # at the start, or with an epoch that an attempt before has left to be validated
            # What an earlier attempt has logged of the steps that are done again now is not shown.
            purged = event.total_step + 1 if isinstance(event, Started) else None
            self._writer = SummaryWriter(self._folder, purge_step=purged)
        for name, value, step in self.scalars(event):
            self._writer.add_scalar(name, value, step)

    def close(self, ending: Ending) -> None:
        from torch.utils.tensorboard.summary import hparams

        if self._writer is None:
            return
        # Not add_hparams(): that makes a second run of them.
        for summary in hparams(dict(self.settings), self.final(ending)):  # type: ignore[no-untyped-call]
            self._writer.file_writer.add_summary(summary)
        for name, value in self.final(ending).items():
            self._writer.add_scalar(name, value)
        for name, png in ending.pictures.items():
            picture = Image.open(io.BytesIO(png)).convert("RGBA")
            image = np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))
            self._writer.add_image(name, image, dataformats="HWC")
        self._writer.close()
        if self._elsewhere:
            self.run.write_files({path.name: path.read_bytes() for path in Path(self._folder).iterdir()})
            self._elsewhere.cleanup()


def _mute_writer_thread() -> None:
    """Keep the traceback of TensorBoard's own thread off the console: its error comes up at the next call as well."""
    show = threading.excepthook

    def show_others(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            show(args)

    threading.excepthook = show_others
