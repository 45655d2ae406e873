"""A run's figures as CSV files, written as they come in, so that they are there also when a run is interrupted.

metrics.csv   a row per epoch
steps.csv     a row about every half second of training: the mean over the steps since the row before
predictions.csv, once the run is tested: a row per test example, in the data set's order
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mnist_ray.storage import RunFolder, unless_damaged
from mnist_ray.training.events import EpochFinished, Event, Progress, Started, Validated
from mnist_ray.training.metrics import Evaluation
from mnist_ray.workload.interface import Workload

METRICS_FILE, STEPS_FILE, PREDICTIONS_FILE = "metrics.csv", "steps.csv", "predictions.csv"
_STEPS_INTERVAL_S = 10.0


class History:
    """The rows of a run's metrics.csv and steps.csv; a resumed run goes on with those that are there.

    ``warn`` is told of damaged ones, which are begun anew.
    """

    def __init__(self, run: RunFolder, workload: Workload, warn: Callable[[str], None] = lambda note: None) -> None:
        self._run = run
        self._workload = workload
        train, val = ([f"{part}_{metric.name}" for metric in workload.figures] for part in ("train", "val"))
        self._columns = ("epoch", *train, *val, "epoch_s", workload.rate, "val_s")
        self._step_columns = ("step", "epoch", *train)
        epochs = unless_damaged(lambda: read_figures(run, METRICS_FILE, "epoch"), warn) or []
        steps = unless_damaged(lambda: read_figures(run, STEPS_FILE, "step", "epoch"), warn) or []
        self.rows: dict[int, dict[str, Any]] = {int(float(row["epoch"])): dict(row) for row in epochs}
        self._steps: list[Mapping[str, Any]] = list(steps)
        self._steps_written = time.monotonic()
        self.num_workers = 0
        """Of the last attempt; an elastic run's changes."""

    def add(self, event: Event) -> None:
        """Put an event's figures in their place; when training starts again, drop what it will do again."""
        match event:
            case Started():
                self.num_workers = event.num_workers
                self.rows = {epoch: row for epoch, row in self.rows.items() if epoch <= event.epoch}
                self._steps = [row for row in self._steps if int(float(row["step"])) <= event.total_step]
            case Progress():
                self._add_step(event)
            case EpochFinished(last):
                self._update(last.epoch, "train", last.so_far)
                self.rows[last.epoch] |= {
                    "epoch_s": round(last.epoch_s, 3),
                    self._workload.rate: round(last.examples_per_s, 1),
                }
                self._write()
            case Validated():
                self._update(event.epoch, "val", event.figures)
                self.rows[event.epoch] |= {"val_s": round(event.seconds, 3)}
                self._write()

    @property
    def unvalidated(self) -> list[int]:
        """The finished epochs whose checkpoints no task has evaluated."""
        return [epoch for epoch, row in sorted(self.rows.items()) if row.get("val_loss", "") == ""]

    def mean_rate(self) -> float | None:
        """Return the examples per second over all epochs that were told of; None where none was.

        Of the epochs before a kill, the last may not have been.
        """
        told = [row for row in self.rows.values() if row.get("epoch_s") and row.get(self._workload.rate)]
        rates = [(float(row[self._workload.rate]), float(row["epoch_s"])) for row in told]
        if not rates:
            return None
        return round(sum(rate * seconds for rate, seconds in rates) / sum(seconds for _, seconds in rates), 1)

    def _update(self, epoch: int, part: str, figures: Mapping[str, float]) -> None:
        row = self.rows.setdefault(epoch, {"epoch": epoch})
        row.update({f"{part}_{name}": value for name, value in figures.items()})

    def _write(self) -> None:
        write_csv(self._run, METRICS_FILE, self._columns, (self.rows[epoch] for epoch in sorted(self.rows)))

    def _add_step(self, progress: Progress) -> None:
        epochs = round(progress.epoch - 1 + progress.step / progress.num_steps, 5)
        figures = {f"train_{name}": value for name, value in progress.window.items()}
        self._steps.append({"step": progress.total_step, "epoch": epochs, **figures})
        if time.monotonic() - self._steps_written > _STEPS_INTERVAL_S:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet. Raises JobError."""
        write_csv(self._run, STEPS_FILE, self._step_columns, self._steps)
        self._steps_written = time.monotonic()


def read_csv(run: RunFolder, file_name: str, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """Return the rows of a file in a run's folder; none where there is no such file.

    Raises DamagedFileError where it is no CSV, or has none of the columns that it must have.
    """
    text = run.read_text(file_name)
    if text is None:
        return []
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise run.damaged(file_name, error) from error
    lacking = [name for name in columns if name not in (reader.fieldnames or ())]
    if lacking or not reader.fieldnames:
        raise run.damaged(file_name, f"it has no column {lacking[0]}" if lacking else "it is empty")
    for row in rows:
        if None in row or None in row.values():  # of a row with more values than columns, or fewer
            raise run.damaged(file_name, f"a row has not {len(reader.fieldnames)} values")
    return rows


def read_figures(run: RunFolder, file_name: str, *places: str) -> list[dict[str, str]]:
    """Return the rows of a file of numbers, of which some may not be there.

    ``places`` are columns that say where in the training a row belongs; the first counts. Raises DamagedFileError.
    """
    rows = read_csv(run, file_name, places)
    try:
        for row in numbers_of(rows):
            if not (row[places[0]].is_integer() and all(0 < row[place] < math.inf for place in places)):
                raise ValueError(f"there is no {places[0]} {row[places[0]]:g}")
    except ValueError as error:
        raise run.damaged(file_name, error) from error
    return rows


def numbers_of(rows: Iterable[Mapping[str, str]]) -> list[dict[str, float]]:
    """Return rows of texts as numbers; NaN where a figure is not there. Raises ValueError for what is no number."""
    return [{name: float(value) if value else math.nan for name, value in row.items()} for row in rows]


def write_csv(run: RunFolder, file_name: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows into a file of a run's folder, as a whole. Raises JobError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")  # of metrics that there were
    writer.writeheader()
    writer.writerows(rows)
    run.write_text(file_name, text.getvalue())


def write_predictions(run: RunFolder, workload: Workload, evaluation: Evaluation) -> None:
    """Write predictions.csv, where the workload has predictions. Raises JobError."""
    columns = workload.readable(evaluation.columns)
    if columns:
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        write_csv(run, PREDICTIONS_FILE, list(columns), rows)
