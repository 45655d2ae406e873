"""A run's figures as CSV files, written as they come in, so that they are there also when a run is interrupted.

metrics.csv   a row per epoch
steps.csv     a row about every half second of training: the mean over the steps since the row before
predictions.csv, once the run is tested: a row per test image, in the data set's order
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mnist_ray.storage import RunFolder
from mnist_ray.training.events import EpochFinished, Event, Started, Validated
from mnist_ray.training.metrics import Evaluation, Progress

METRICS_FILE, STEPS_FILE, PREDICTIONS_FILE = "metrics.csv", "steps.csv", "predictions.csv"
_METRICS = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "epoch_s", "images_per_s", "val_s")
_PREDICTIONS = ("label", "prediction", "probability")
_STEPS = ("step", "epoch", "train_loss", "train_accuracy")
_STEPS_INTERVAL_S = 10.0


class History:
    """The rows of a run's metrics.csv and steps.csv; a resumed run goes on with those that are there."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self.rows: dict[int, dict[str, Any]] = {int(row["epoch"]): dict(row) for row in read_csv(run, METRICS_FILE)}
        self._steps: list[Mapping[str, Any]] = list(read_csv(run, STEPS_FILE))
        self._steps_written = time.monotonic()
        self.num_workers = 0
        """Of the last attempt; an elastic run's changes."""

    def add(self, event: Event) -> None:
        """Put an event's figures in their place; when training starts again, drop what it will do again."""
        match event:
            case Started():
                self.num_workers = event.num_workers
                self.rows = {epoch: row for epoch, row in self.rows.items() if epoch <= event.epoch}
                self._steps = [row for row in self._steps if int(row["step"]) <= event.total_step]
            case Progress():
                self._add_step(event)
            case EpochFinished(last):
                self._update(
                    last.epoch,
                    train_loss=last.sums.loss,
                    train_accuracy=last.sums.accuracy,
                    epoch_s=round(last.epoch_s, 3),
                    images_per_s=round(last.images_per_s, 1),
                )
            case Validated():
                self._update(
                    event.epoch, val_loss=event.loss, val_accuracy=event.accuracy, val_s=round(event.seconds, 3)
                )

    @property
    def unvalidated(self) -> list[int]:
        """The finished epochs whose checkpoints no task has evaluated."""
        return [epoch for epoch, row in sorted(self.rows.items()) if row.get("val_accuracy", "") == ""]

    def _update(self, epoch: int, **figures: Any) -> None:
        self.rows.setdefault(epoch, {"epoch": epoch}).update(figures)
        write_csv(self._run, METRICS_FILE, _METRICS, (self.rows[epoch] for epoch in sorted(self.rows)))

    def _add_step(self, progress: Progress) -> None:
        epochs = progress.epoch - 1 + progress.step / progress.num_steps
        figures = (progress.total_step, round(epochs, 5), progress.window.loss, progress.window.accuracy)
        self._steps.append(dict(zip(_STEPS, figures, strict=True)))
        if time.monotonic() - self._steps_written > _STEPS_INTERVAL_S:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet. Raises JobError."""
        write_csv(self._run, STEPS_FILE, _STEPS, self._steps)
        self._steps_written = time.monotonic()


def read_csv(run: RunFolder, file_name: str) -> list[dict[str, str]]:
    """Return the rows of a file in a run's folder; none where there is no such file."""
    return list(csv.DictReader(io.StringIO(run.read_text(file_name) or "")))


def write_csv(run: RunFolder, file_name: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows into a file of a run's folder, as a whole. Raises JobError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    run.write_text(file_name, text.getvalue())


def write_predictions(run: RunFolder, labels: np.ndarray, evaluation: Evaluation) -> None:
    """Write predictions.csv. Raises JobError."""
    probabilities = [f"{probability:.6f}" for probability in evaluation.probabilities]
    columns = zip(labels.tolist(), evaluation.predictions.tolist(), probabilities, strict=True)
    write_csv(run, PREDICTIONS_FILE, _PREDICTIONS, (dict(zip(_PREDICTIONS, row, strict=True)) for row in columns))


def read_predictions(run: RunFolder) -> np.ndarray | None:
    """Return (test images, 3): label, prediction, probability; None where the run was not tested."""
    rows = read_csv(run, PREDICTIONS_FILE)
    return np.array([[float(row[name]) for name in _PREDICTIONS] for row in rows]) if rows else None
