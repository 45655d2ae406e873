"""A run's values as CSV files, written as they come in, so that they are there also if a run is interrupted.

metrics.csv   a row per epoch
steps.csv     a row about every half second of training: the mean over the steps since the row before
predictions.csv, once the run is tested: a row per test example, in the data set's order
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
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

    ``warn`` is called for damaged files, which are started again.
    """

    def __init__(self, run: RunFolder, workload: Workload, warn: Callable[[str], None] = lambda note: None) -> None:
        self._run = run
        self._workload = workload
        train, val = ([f"{split}_{metric.name}" for metric in workload.all_metrics] for split in ("train", "val"))
        self._columns = ("epoch", *train, *val, "epoch_s", workload.rate, "val_s")
        epochs = unless_damaged(lambda: read_figures(run, METRICS_FILE, "epoch"), warn) or []
        steps = unless_damaged(lambda: read_steps(run), warn) or []
        self.rows: dict[int, dict[str, Any]] = {int(float(row["epoch"])): dict(row) for row in epochs}
        self._steps = _Steps(run, ("step", "epoch", *train), steps)
        self.num_workers = 0  # of the last attempt; an elastic run's changes

    def add(self, event: Event) -> None:
        """Put an event's values in their place; when training starts again, drop what it will do again."""
        match event:
            case Started():
                self.num_workers = event.num_workers
                self.rows = {epoch: row for epoch, row in self.rows.items() if epoch <= event.epoch}
                self._steps.drop_after(event.total_step)
            case Progress():
                epochs = round(event.epoch - 1 + event.step / event.num_steps, 5)
                self._steps.add({"step": event.total_step, "epoch": epochs, **_named("train", event.window)})
            case EpochFinished(last):
                rate = {self._workload.rate: round(last.examples_per_s, 1)}
                self._update(last.epoch, _named("train", last.so_far) | {"epoch_s": round(last.epoch_s, 3)} | rate)
            case Validated():
                self._update(event.epoch, _named("val", event.values) | {"val_s": round(event.seconds, 3)})

    def _update(self, epoch: int, values: Mapping[str, Any]) -> None:
        self.rows.setdefault(epoch, {"epoch": epoch}).update(values)
        write_csv(self._run, METRICS_FILE, self._columns, (self.rows[epoch] for epoch in sorted(self.rows)))

    @property
    def unvalidated(self) -> list[int]:
        """The finished epochs whose checkpoints no task has evaluated."""
        return [epoch for epoch, row in sorted(self.rows.items()) if row.get("val_loss", "") == ""]

    def mean_rate(self) -> float | None:
        """Return the examples per second over all epochs that have them; None if none has.

        The last epoch before a kill may lack them.
        """
        rated = [row for row in self.rows.values() if row.get("epoch_s") and row.get(self._workload.rate)]
        rates = [(float(row[self._workload.rate]), float(row["epoch_s"])) for row in rated]
        if not rates:
            return None
        return round(sum(rate * seconds for rate, seconds in rates) / sum(seconds for _, seconds in rates), 1)

    def flush(self) -> None:
        """Write the last steps; nothing may be added any more. Raises JobError."""
        self._steps.close()


def _named(split: str, values: Mapping[str, float]) -> dict[str, Any]:
    return {f"{split}_{name}": value for name, value in values.items()}


class _Steps:
    """The rows of steps.csv, which a thread writes: storage that is away for a while holds nothing else up.

    Rows are appended if the storage can do that. Else the file is written as a whole, each time that it has grown by a
    tenth: ever more seldom.
    """

    def __init__(self, run: RunFolder, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
        self._run, self._columns, self._can_append = run, columns, isinstance(run.filesystem, fs.LocalFileSystem)
        self._lines = [(int(float(row["step"])), csv_text(columns, [row])) for row in rows]
        self._num_written = 0  # lines that the file has; 0 if it is to be written as a whole
        self._written_at = time.monotonic()
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row, to be written some seconds later."""
        self._lines.append((row["step"], csv_text(self._columns, [row])))
        is_due = time.monotonic() - self._written_at > WRITTEN_EVERY_S
        has_grown = self._can_append or len(self._lines) >= _GROWN_BY * self._num_written
        if is_due and has_grown and (self._writing is None or self._writing.done()):
            self._writing = self._pool.submit(self._write)
            self._written_at = time.monotonic()

    def drop_after(self, step: int) -> None:
        """Drop the rows of later steps, which will be done again."""
        left = [line for line in self._lines if line[0] <= step]
        if len(left) < len(self._lines):
            if self._writing is not None:
                wait([self._writing])
            self._lines, self._num_written = left, 0

    def close(self) -> None:
        """Write the file as a whole. Raises JobError."""
        self._pool.shutdown()
        self._num_written = 0
        self._write()

    def _write(self) -> None:
        """Write the lines that the file lacks. Raises JobError; the next time it is written as a whole then."""
        lines, num_written, self._num_written = list(self._lines), self._num_written, 0
        if num_written and self._can_append:
            self._run.append_text(STEPS_FILE, "".join(text for _, text in lines[num_written:]))
        else:
            header = csv_text(self._columns, [], has_header=True)
            self._run.write_text(STEPS_FILE, header + "".join(text for _, text in lines))
        self._num_written = len(lines)


def write_predictions(run: RunFolder, workload: Workload, evaluation: Evaluation) -> None:
    """Write predictions.csv, if the workload has predictions. Raises JobError."""
    columns = workload.readable(evaluation.columns)
    if columns:
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        write_csv(run, PREDICTIONS_FILE, list(columns), rows)
