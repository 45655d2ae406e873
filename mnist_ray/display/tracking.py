"""Who follows a run, and TensorBoard and MLflow among them. One that fails warns once; training goes on."""

from __future__ import annotations

import functools
import importlib.util
import io
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import numpy as np
from PIL import Image
from pyarrow import fs
from ray.train import Checkpoint

from mnist_ray import user_code
from mnist_ray.config import OutputConfig
from mnist_ray.errors import first_line
from mnist_ray.screen import MLFLOW_USER, shown, without_user
from mnist_ray.storage import RunFolder
from mnist_ray.tracker import Ending, Tracker
from mnist_ray.training.checkpoint import fetch
from mnist_ray.training.events import Event, Started
from mnist_ray.workload.interface import Workload

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
    """Track a run in TensorBoard, where that is installed, and where ``output`` says."""
    plain = {name: value if isinstance(value, (bool, int, float)) else shown(value) for name, value in settings.items()}
    trackers: dict[str, Callable[[], Tracker]] = {}
    if importlib.util.find_spec("tensorboard") is not None:
        trackers["TensorBoard"] = lambda: _TensorBoard(run, workload, plain)
    if (mlflow_uri := output.mlflow) is not None:
        trackers["MLflow"] = lambda: _MLflow(run, workload, plain, mlflow_uri)
    if (project := output.wandb) is not None:
        from mnist_ray.display.wandb import WandB

        trackers["Weights & Biases"] = lambda: WandB(run, workload, plain, project)
    if output.tracker is not None:
        own, _ = user_code.find(output.tracker, Tracker)
        trackers[own.__name__] = lambda: own(run, workload, plain)
    return Trackers(trackers, warn)


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
            self.run.upload(self._folder)
            self._elsewhere.cleanup()


def _mute_writer_thread() -> None:
    """Keep the traceback of TensorBoard's own thread off the console: its error comes up at the next call as well."""
    show = threading.excepthook

    def show_others(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            show(args)

    threading.excepthook = show_others


def _with_user_in_variables(uri: str) -> str:
    """Return a server's URI without its user information, which MLflow would print; it is where MLflow asks for it."""
    server, (user, password) = urlsplit(uri), MLFLOW_USER
    if server.scheme not in ("http", "https") or not (server.username and server.password):
        return uri
    os.environ[user], os.environ[password] = unquote(server.username), unquote(server.password)
    return urlunsplit(server._replace(netloc=server.netloc.rpartition("@")[2]))


class _MLflow(Tracker):
    """A run in the experiment ``mnist_ray``; a resumed run goes on in the one that it has there."""

    def __init__(self, run: RunFolder, workload: Workload, settings: Mapping[str, Any], uri: str) -> None:
        super().__init__(run, workload, settings)
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        mlflow.set_tracking_uri(_with_user_in_variables(uri))
        shown_uri, _ = without_user(run.uri)  # the same where a resumed run has the keys from variables
        experiment = mlflow.set_experiment("mnist_ray")
        known = mlflow.search_runs(filter_string=f"tags.`mnist_ray.run` = '{shown_uri}'", output_format="list")
        self._client = mlflow.MlflowClient()
        if known:
            self._id = known[0].info.run_id
            self._client.set_terminated(self._id, "RUNNING")
        else:
            tags = {"mnist_ray.run": shown_uri}
            created = self._client.create_run(experiment.experiment_id, run_name=run.name, tags=tags)
            self._id = created.info.run_id
            for name, value in settings.items():
                self._client.log_param(self._id, name, value)

    def log(self, event: Event) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value, step in self.scalars(event)]
        for start in range(0, len(metrics), 1000):  # the most that a server takes at once
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])

    def close(self, ending: Ending) -> None:
        for name, value in self.final(ending).items():
            self._client.log_metric(self._id, name, value)
        with tempfile.TemporaryDirectory() as folder:
            for name, png in ending.pictures.items():
                (Path(folder) / f"{name}.png").write_bytes(png)
            self._client.log_artifacts(self._id, folder, "pictures")
        if ending.checkpoint is not None:
            self._log_model(ending.checkpoint)
        self._client.set_terminated(self._id, "KILLED" if ending.result is None else "FINISHED")

    def _log_model(self, checkpoint: Checkpoint) -> None:
        import mlflow

        model = fetch(checkpoint.filesystem, checkpoint.path, self.workload)
        shape = self.workload.facts.get("model_input")
        if shape is None:  # MLflow asks for an example, and the model's is no tensor
            return
        example = np.zeros((2, *shape["shape"]), shape["dtype"])
        with mlflow.start_run(run_id=self._id):
            # Not a pickle; and with its requirements named, MLflow does not start a process to find them out.
            mlflow.pytorch.log_model(
                model,
                name="model",
                input_example=example,
                serialization_format="pt2",
                pip_requirements=["torch"],
            )
