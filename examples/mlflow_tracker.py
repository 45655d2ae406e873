"""Logs runs to MLflow, on a server or in a file: `pip install -e '.[mlflow]'`, then

MLFLOW_TRACKING_URI=sqlite:///mlflow.db python jobs/train.py --tracker examples/mlflow_tracker.py

A resumed run continues its MLflow run. The trials of a sweep are runs, too. The user and password of a server belong in
MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, not in the URI.
"""

import logging
import os
import tempfile
import time
from pathlib import Path

import mlflow
import torch
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from mnist_ray.checkpoints.saved_model import load_model
from mnist_ray.storage import ORIGIN_FILE
from mnist_ray.text import masked
from mnist_ray.tools.export import inputs_of, test_batches
from mnist_ray.trackers import Tracker
from mnist_ray.training.events import Started

FOLDER = "mnist_ray.run"  # a tag with the run's folder, to find the MLflow run again
MOST_METRICS = 1000  # a server accepts no more in one request
MAX_DIGEST = 36  # characters


class MLflow(Tracker):
    """A run in the experiment ``mnist_ray``."""

    def __init__(self, run, workload, settings):
        super().__init__(run, workload, settings)
        # Otherwise, MLflow prints the run's address each time the run's state changes.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.experiment = mlflow.set_experiment("mnist_ray").experiment_id
        self.client = mlflow.MlflowClient()
        self.folder = masked(run.uri)
        self.id = self.open(settings)
        self.describe()

    def open(self, settings):
        """Return the id of the folder's MLflow run; create the run if there is none."""
        query = f"tags.`{FOLDER}` = '{self.folder}'"
        run = next(iter(self.client.search_runs([self.experiment], query, max_results=1)), None)
        if run is None:
            run = self.client.create_run(self.experiment, run_name=self.run.name, tags={FOLDER: self.folder})
        else:
            self.client.set_terminated(run.info.run_id, "RUNNING")
        new = [Param(key, str(value)) for key, value in settings.items() if key not in run.data.params]
        self.client.log_batch(run.info.run_id, params=new)
        return run.info.run_id

    def describe(self):
        """Log the command, the commit and the data."""
        origin = self.run.read_json(ORIGIN_FILE) or {}
        tags = {"command_line": origin.get("command_line"), "mlflow.source.git.commit": origin.get("git_commit")}
        self.client.log_batch(self.id, tags=[RunTag(key, value) for key, value in tags.items() if value])
        name = origin.get("data_name", "unknown")
        digests = {split: (digest or "unknown")[:MAX_DIGEST] for split, digest in origin.get("data", {}).items()}
        inputs = [
            DatasetInput(Dataset(name, digest, "local", name), [InputTag("mlflow.data.context", split)])
            for split, digest in digests.items()
        ]
        self.client.log_inputs(self.id, inputs)

    def log(self, event):
        """Log an event's values."""
        if isinstance(event, Started):
            self.client.set_tag(self.id, "workers", f"{event.num_workers} × {event.device}")
        self.log_metrics(self.scalars(event))

    def log_metrics(self, values):
        """Log (name, value, step) triples."""
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value, step in values]
        for start in range(0, len(metrics), MOST_METRICS):
            self.client.log_batch(self.id, metrics=metrics[start : start + MOST_METRICS])

    def close(self, ending):
        """Log the test metrics, the pictures and the model."""
        self.log_metrics([(name, value, 0) for name, value in self.final(ending).items()])
        with tempfile.TemporaryDirectory() as folder:
            for name, png in ending.pictures.items():
                (Path(folder) / f"{name}.png").write_bytes(png)
            self.client.log_artifacts(self.id, folder, "pictures")
        if ending.checkpoint is not None:
            self.log_model(ending.checkpoint)
        self.client.set_terminated(self.id, "KILLED" if ending.has_failed else "FINISHED")

    def log_model(self, checkpoint):
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
