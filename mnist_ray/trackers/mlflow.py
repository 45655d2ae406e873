"""Runs in MLflow, on a server or in a file."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import mlflow
import numpy as np
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from mnist_ray.errors import masked
from mnist_ray.storage import ORIGIN_FILE, RunFolder
from mnist_ray.trackers.tracker import Ending, Tracker
from mnist_ray.training.checkpoint import load_model
from mnist_ray.training.events import Event, Started, TrialEnded
from mnist_ray.workload.base import Workload

MLFLOW_USER = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
_FOLDER = "mnist_ray.run"  # the tag by which a run is found again
_MOST_METRICS = 1000  # that a server takes at once
_LONGEST_DIGEST = 36


class MLflow(Tracker):
    """A run in the experiment ``mnist_ray``; a resumed run goes on in the one that it has there.

    A sweep's run has its trials, and its training with the defaults, as nested runs.
    """

    def __init__(
        self,
        run: RunFolder,
        workload: Workload,
        settings: Mapping[str, Any],
        uri: str,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Begin to follow ``run``; ``say`` is called in the end with the place where a server shows it."""
        super().__init__(run, workload, settings)
        self._say = say
        # Else MLflow prints where a run is each time that its state changes.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        mlflow.set_tracking_uri(_with_user_in_variables(uri))
        self._experiment = mlflow.set_experiment("mnist_ray").experiment_id
        self._client = mlflow.MlflowClient()
        self._folder = masked(run.uri)
        parent = self._find(masked(run.storage_path))
        self._id = self._open(self._folder, run.name, settings, parent.info.run_id if parent else None)
        self._describe()

    def _find(self, folder: str) -> Any:
        filter_string = f"tags.`{_FOLDER}` = '{folder}'"
        return next(iter(self._client.search_runs([self._experiment], filter_string, max_results=1)), None)

    def _open(self, folder: str, name: str, settings: Mapping[str, Any], parent: str | None) -> str:
        """Return the id of the run of a folder, a new one if it has none yet."""
        run = self._find(folder)
        if run is None:
            tags = {_FOLDER: folder, **({"mlflow.parentRunId": parent} if parent else {})}
            run = self._client.create_run(self._experiment, run_name=name, tags=tags)
        else:
            self._client.set_terminated(run.info.run_id, "RUNNING")
        # A sweep's run has its own settings first, then those that it has chosen.
        new = [Param(key, str(value)) for key, value in settings.items() if key not in run.data.params]
        self._client.log_batch(run.info.run_id, params=new)
        return str(run.info.run_id)

    def _describe(self) -> None:
        """Say where the run comes from: the commit, the command, the data."""
        origin = self.run.read_json(ORIGIN_FILE) or {}
        tags = {"command_line": origin.get("command_line"), "mlflow.source.git.commit": origin.get("git_commit")}
        self._client.log_batch(self._id, tags=[RunTag(key, value) for key, value in tags.items() if value])
        name = origin.get("data_name", "unknown")
        digests = {split: (digest or "unknown")[:_LONGEST_DIGEST] for split, digest in origin.get("data", {}).items()}
        data = [
            DatasetInput(Dataset(name, digest, "local", name), [InputTag("mlflow.data.context", split)])
            for split, digest in digests.items()
        ]
        self._client.log_inputs(self._id, data)

    def log(self, event: Event) -> None:
        """Write an event's values; of a sweep's trial, all that is known."""
        if isinstance(event, TrialEnded):
            self._log_trial(event)
        if isinstance(event, Started):
            self._client.set_tag(self._id, "workers", f"{event.num_workers} × {event.device}")
        self._log_metrics(self._id, self.scalars(event))

    def _log_trial(self, trial: TrialEnded) -> None:
        run = self._open(f"{self._folder}#{trial.number}", f"trial {trial.number}", trial.settings, self._id)
        self._log_metrics(run, [(name, value, 0) for name, value in trial.values.items()])
        self._client.set_tag(run, "state", trial.state)
        self._client.set_terminated(run, "FAILED" if trial.has_failed else "FINISHED")

    def _log_metrics(self, run: str, values: Iterable[tuple[str, float, int]]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value, step in values]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(run, metrics=metrics[start : start + _MOST_METRICS])

    def close(self, ending: Ending) -> None:
        """Write the test's values, the pictures and the model."""
        self._log_metrics(self._id, [(name, value, 0) for name, value in self.final(ending).items()])
        with tempfile.TemporaryDirectory() as folder:
            for name, png in ending.pictures.items():
                (Path(folder) / f"{name}.png").write_bytes(png)
            self._client.log_artifacts(self._id, folder, "pictures")
        if ending.checkpoint is not None:
            self._log_model(ending.checkpoint)
        self._client.set_terminated(self._id, "KILLED" if ending.result is None else "FINISHED")
        server = self._client.tracking_uri
        if server.startswith("http"):
            self._say(f"MLflow shows it at {server.rstrip('/')}/#/experiments/{self._experiment}/runs/{self._id}")

    def _log_model(self, checkpoint: RunFolder) -> None:
        shape = self.workload.metadata.get("model_input")
        if shape is None:  # MLflow asks for an example, and the model's is no tensor
            return
        with mlflow.start_run(run_id=self._id):
            mlflow.pytorch.log_model(
                load_model(checkpoint, self.workload),
                name="model",
                input_example=np.zeros((2, *shape["shape"]), shape["dtype"]),
                serialization_format="pt2",  # not a pickle
                pip_requirements=["torch"],  # named, else MLflow starts a process to find them out
            )


def _with_user_in_variables(uri: str) -> str:
    """Return a server's URI without its user information, which MLflow would print; MLflow takes it from variables."""
    server, (user, password) = urlsplit(uri), MLFLOW_USER
    if server.scheme not in ("http", "https") or not (server.username and server.password):
        return uri
    os.environ[user], os.environ[password] = unquote(server.username), unquote(server.password)
    return urlunsplit(server._replace(netloc=server.netloc.rpartition("@")[2]))
