"""Logs runs to MLflow: ``--tracker mlflow``, on the server or in the file that ``MLFLOW_TRACKING_URI`` names.

A resumed run continues its MLflow run. The trials of a sweep are runs, too. The user and password of a server belong in
``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD``, not in the URI.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import mlflow
import torch
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from mnist_ray.checkpoints.export import inputs_of, test_batches
from mnist_ray.checkpoints.saved_model import load_model
from mnist_ray.storage import ORIGIN_FILE, REPORT_FILE, RunFolder
from mnist_ray.text import masked
from mnist_ray.trackers import Ending, Tracker
from mnist_ray.training.events import Event, Started
from mnist_ray.workload.base import Workload

_FOLDER = "mnist_ray.run"  # a tag with the run's folder, to find the MLflow run again
_MAX_METRICS = 1000  # a server accepts no more in one request
_MAX_DIGEST = 36  # characters


class MLflow(Tracker):
    """A run in the experiment ``mnist_ray``."""

    def __init__(self, run: RunFolder, workload: Workload, settings: Mapping[str, Any]) -> None:
        super().__init__(run, workload, settings)
        # Otherwise, MLflow prints the run's address each time the run's state changes.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.experiment = mlflow.set_experiment("mnist_ray").experiment_id
        self.client = mlflow.MlflowClient()
        self.id = self._open()
        self._describe()

    def _open(self) -> str:
        """Return the id of the folder's MLflow run; create the run if there is none."""
        folder = masked(self.run.uri)
        query = f"tags.`{_FOLDER}` = '{folder}'"
        run = next(iter(self.client.search_runs([self.experiment], query, max_results=1)), None)
        if run is None:
            run = self.client.create_run(self.experiment, run_name=self.run.name, tags={_FOLDER: folder})
        else:
            self.client.set_terminated(run.info.run_id, "RUNNING")
        new = [Param(key, str(value)) for key, value in self.settings.items() if key not in run.data.params]
        self.client.log_batch(run.info.run_id, params=new)
        return str(run.info.run_id)

    def _describe(self) -> None:
        """Log the command, the commit and the data."""
        origin = self.run.read_json(ORIGIN_FILE) or {}
        tags = {"command_line": origin.get("command_line"), "mlflow.source.git.commit": origin.get("git_commit")}
        self.client.log_batch(self.id, tags=[RunTag(key, value) for key, value in tags.items() if value])
        name = origin.get("data_name", "unknown")
        inputs = [
            DatasetInput(
                Dataset(name, (digest or "unknown")[:_MAX_DIGEST], "local", name),
                [InputTag("mlflow.data.context", split)],
            )
            for split, digest in origin.get("data", {}).items()
        ]
        self.client.log_inputs(self.id, inputs)

    def log(self, event: Event) -> None:
        """Log an event's values."""
        if isinstance(event, Started):
            self.client.set_tag(self.id, "workers", f"{event.num_workers} × {event.device}")
        self._log_metrics(self.scalars(event))

    def _log_metrics(self, values: Iterable[tuple[str, float, int]]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value, step in values]
        for start in range(0, len(metrics), _MAX_METRICS):
            self.client.log_batch(self.id, metrics=metrics[start : start + _MAX_METRICS])

    def close(self, ending: Ending) -> None:
        """Log the test metrics, the report and the model."""
        self._log_metrics((name, value, 0) for name, value in self.final(ending).items())
        if (page := self.run.read_text(REPORT_FILE)) is not None:
            self.client.log_text(self.id, page, REPORT_FILE)
        if ending.checkpoint is not None:
            self._log_model(ending.checkpoint)
        self.client.set_terminated(self.id, "KILLED" if ending.has_failed else "FINISHED")

    def _log_model(self, checkpoint: RunFolder) -> None:
        """Log the tested model if it takes a single tensor: MLflow asks for an example of the input."""
        example = inputs_of(self.workload, test_batches(self.workload), 0, 2)
        if not isinstance(example, torch.Tensor):
            return
        with mlflow.start_run(run_id=self.id):
            mlflow.pytorch.log_model(
                load_model(checkpoint, self.workload),
                name="model",
                input_example=example.numpy(),
                serialization_format="pt2",  # not a pickle
                pip_requirements=["torch"],  # otherwise, MLflow starts a process to find them
            )
