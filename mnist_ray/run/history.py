"""A run's figures as CSV files, written as they come in, so that they are there also when a run is interrupted.

metrics.csv   a row per epoch
steps.csv     a row about every half second of training: the mean over the steps since the row before
predictions.csv, once the run is tested: a row per test example, in the data set's order
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pyarrow import fs

from mnist_ray.report.run_files import (
    METRICS_FILE,
    PREDICTIONS_FILE,
    STEPS_FILE,
    csv_text,
    read_figures,
    read_steps,
    write_csv,
)
from mnist_ray.storage import RunFolder, unless_damaged
from mnist_ray.training.events import EpochFinished, Event, Progress, Started, Validated
from mnist_ray.training.metrics import Evaluation
from mnist_ray.workload.base import Workload

WRITTEN_EVERY_S = 10.0  # steps.csv, at the most
_GROWN_BY = 1.1  # before it is written as a whole once more


class History:
    """The rows of a run's metrics.csv and steps.csv; a resumed run goes on with those that are there.

    ``warn`` is told of damaged ones, which are begun anew.
    """

    def __init__(self, run: RunFolder, workload: Workload, warn: Callable[[str], None] = lambda note: None) -> None:
        self._run = run
        self._workload = workload
        train, val = ([f"{part}_{metric.name}" for metric in workload.all_metrics] for part in ("train", "val"))
        self._columns = ("epoch", *train, *val, "epoch_s", workload.rate, "val_s")
        epochs = unless_damaged(lambda: read_figures(run, METRICS_FILE, "epoch"), warn) or []
        steps = unless_damaged(lambda: read_steps(run), warn) or []
        self.rows: dict[int, dict[str, Any]] = {int(float(row["epoch"])): dict(row) for row in epochs}
        self._steps = _Steps(run, ("step", "epoch", *train), steps)
        self.num_workers = 0  # of the last attempt; an elastic run's changes

    def add(self, event: Event) -> None:
        """Put an event's figures in their place; when training starts again, drop what it will do again."""
        match event:
            case Started():
                self.num_workers = event.num_workers
                self.rows = {epoch: row for epoch, row in self.rows.items() if epoch <= event.epoch}
                self._steps.drop_after(event.total_step)
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
                self._update(event.epoch, "val", event.values)
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
        rated = [row for row in self.rows.values() if row.get("epoch_s") and row.get(self._workload.rate)]
        rates = [(float(row[self._workload.rate]), float(row["epoch_s"])) for row in rated]
        if not rates:
            return None
        return round(sum(rate * seconds for rate, seconds in rates) / sum(seconds for _, seconds in rates), 1)

    def _update(self, epoch: int, part: str, values: Mapping[str, float]) -> None:
        row = self.rows.setdefault(epoch, {"epoch": epoch})
        row.update({f"{part}_{name}": value for name, value in values.items()})

    def _write(self) -> None:
        write_csv(self._run, METRICS_FILE, self._columns, (self.rows[epoch] for epoch in sorted(self.rows)))

    def _add_step(self, progress: Progress) -> None:
        epochs = round(progress.epoch - 1 + progress.step / progress.num_steps, 5)
        values = {f"train_{name}": value for name, value in progress.window.items()}
        self._steps.add({"step": progress.total_step, "epoch": epochs, **values})

    def flush(self) -> None:
        """Write what is not written yet; nothing is added any more. Raises JobError."""
        self._steps.close()


class _Steps:
    """The rows of steps.csv, which a thread writes: storage that is away for a while holds nothing else up.

    Rows are appended where the storage takes that. Elsewhere the file is written as a whole, whenever a tenth has come
    to it: ever more seldom.
    """

    def __init__(self, run: RunFolder, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
        self._run, self._columns, self._appends = run, columns, isinstance(run.filesystem, fs.LocalFileSystem)
        self._lines = [(int(float(row["step"])), csv_text(columns, [row])) for row in rows]
        self._num_written = 0  # lines that the file has; 0 where it is to be written as a whole
        self._began = time.monotonic()
        self._writing: Future[int] | None = None
        self._pool = ThreadPoolExecutor(1)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row, to be written some seconds later."""
        self._lines.append((row["step"], csv_text(self._columns, [row])))
        self._end_writing(wait=False)
        is_due = time.monotonic() - self._began > WRITTEN_EVERY_S
        has_grown = self._appends or len(self._lines) >= _GROWN_BY * self._num_written
        if is_due and has_grown and self._writing is None:
            self._writing = self._pool.submit(self._write, self._lines[self._num_written :], self._num_written)
            self._began = time.monotonic()

    def drop_after(self, step: int) -> None:
        """Drop the rows of later steps, which will be done again."""
        left = [line for line in self._lines if line[0] <= step]
        if len(left) < len(self._lines):
            self._end_writing(wait=True)
            self._lines, self._num_written = left, 0

    def close(self) -> None:
        """Write the file as a whole. Raises JobError."""
        self._end_writing(wait=True)
        self._pool.shutdown()
        self._write(self._lines, 0)

    def _end_writing(self, *, wait: bool) -> None:
        if self._writing is not None and (wait or self._writing.done()):
            self._num_written = 0 if self._writing.exception() else self._writing.result()
            self._writing = None

    def _write(self, lines: Sequence[tuple[int, str]], num_written: int) -> int:
        """Write the lines after the first ``num_written``; return how many there are then. Raises JobError."""
        text = "".join(line for _, line in lines)
        if num_written and self._appends:
            self._run.append_text(STEPS_FILE, text)
        else:
            before = "".join(line for _, line in self._lines[:num_written])
            self._run.write_text(STEPS_FILE, csv_text(self._columns, [], has_header=True) + before + text)
        return num_written + len(lines)


def write_predictions(run: RunFolder, workload: Workload, evaluation: Evaluation) -> None:
    """Write predictions.csv, where the workload has predictions. Raises JobError."""
    columns = workload.readable(evaluation.columns)
    if columns:
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        write_csv(run, PREDICTIONS_FILE, list(columns), rows)
