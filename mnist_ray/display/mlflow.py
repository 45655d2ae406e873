"""Runs in MLflow, on a server or in a file."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import numpy as np
from ray.train import Checkpoint

from mnist_ray.screen import MLFLOW_USER, without_user
from mnist_ray.storage import RunFolder
from mnist_ray.tracker import Ending, Tracker
from mnist_ray.training.checkpoint import fetch
from mnist_ray.training.events import Event
from mnist_ray.workload.interface import Workload


class MLflow(Tracker):
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
        """Write an event's figures."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value, step in self.scalars(event)]
        for start in range(0, len(metrics), 1000):  # the most that a server takes at once
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])

    def close(self, ending: Ending) -> None:
        """Write the test's figures, the pictures and the model."""
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


def _with_user_in_variables(uri: str) -> str:
    """Return a server's URI without its user information, which MLflow would print; it is where MLflow asks for it."""
    server, (user, password) = urlsplit(uri), MLFLOW_USER
    if server.scheme not in ("http", "https") or not (server.username and server.password):
        return uri
    os.environ[user], os.environ[password] = unquote(server.username), unquote(server.password)
    return urlunsplit(server._replace(netloc=server.netloc.rpartition("@")[2]))
