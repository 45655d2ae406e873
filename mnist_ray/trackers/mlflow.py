"""Logs runs to MLflow: ``--tracker mlflow``, on the server or in the file that ``MLFLOW_TRACKING_URI`` names.

A resumed run continues its MLflow run. The user and password of a server belong in ``MLFLOW_TRACKING_USERNAME`` and
``MLFLOW_TRACKING_PASSWORD``, not in the URI.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import mlflow
from mlflow.entities import Metric, Param

from mnist_ray.schema import ORIGIN_FILE, REPORT_FILE
from mnist_ray.storage import RunFolder
from mnist_ray.text import masked
from mnist_ray.trackers import Ending, Tracker
from mnist_ray.training.events import Event
from mnist_ray.workload.base import Workload

_FOLDER = "mnist_ray.run"  # a tag with the run's folder, to find the MLflow run again
_MAX_METRICS = 1000  # a server accepts no more in one request


class MLflow(Tracker):
    """A run in the experiment ``mnist_ray``."""

    def __init__(self, run: RunFolder, workload: Workload, settings: Mapping[str, Any]) -> None:
        super().__init__(run, workload, settings)
        # Otherwise, MLflow prints the run's address each time the run's state changes.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        experiment, folder = mlflow.set_experiment("mnist_ray").experiment_id, masked(run.uri)
        self.client = mlflow.MlflowClient()
        known = self.client.search_runs([experiment], f"tags.`{_FOLDER}` = '{folder}'", max_results=1)
        if known:
            self.id = known[0].info.run_id
            self.client.set_terminated(self.id, "RUNNING")
            return
        origin = run.read_json(ORIGIN_FILE) or {}
        tags = {"command_line": origin.get("command_line"), "mlflow.source.git.commit": origin.get("git_commit")}
        tags = {_FOLDER: folder, **{key: value for key, value in tags.items() if value}}
        self.id = self.client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        self.client.log_batch(self.id, params=[Param(key, str(value)) for key, value in settings.items()])

    def log(self, event: Event) -> None:
        """Log an event's values."""
        self._log_metrics(self.scalars(event))

    def _log_metrics(self, values: Iterable[tuple[str, float, int]]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value, step in values]
        for start in range(0, len(metrics), _MAX_METRICS):
            self.client.log_batch(self.id, metrics=metrics[start : start + _MAX_METRICS])

    def close(self, ending: Ending) -> None:
        """Log the test metrics and the report."""
        self._log_metrics((name, value, 0) for name, value in self.final(ending).items())
        if (page := self.run.read_text(REPORT_FILE)) is not None:
            self.client.log_text(self.id, page, REPORT_FILE)
        self.client.set_terminated(self.id, "KILLED" if ending.has_failed else "FINISHED")
