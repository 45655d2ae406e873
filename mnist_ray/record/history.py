"""A run's values as CSV files. They are written during training, so that an interrupted run has them too.

metrics.csv  a row per epoch or validation, written at once
steps.csv    a row about every half second of training: means over the steps since the previous row, and where the
             workers' time went; in a long run, rows are merged in pairs, since all are written at each checkpoint
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from mnist_ray.checkpoints.find import checkpoints_of
from mnist_ray.config import TrainConfig
from mnist_ray.report.run_files import csv_text, joined, merged, read_csv, read_numbers
from mnist_ray.schema import METRICS_FILE, STEPS_FILE
from mnist_ray.storage import RunFolder
from mnist_ray.training.events import (
    TIMES,
    EpochFinished,
    Event,
    Progress,
    Saved,
    Started,
    Validated,
    figures_of,
    seconds_of,
)
from mnist_ray.workload.base import Workload
from mnist_ray.workload.figures import RATE, logged_figures

MAX_STEP_ROWS = 10_000  # of steps.csv; writing them takes 50 ms


def _place(epochs: float) -> float:
    """Return a row's epoch, as the file has it."""
    return int(epochs) if epochs == int(epochs) else round(epochs, 5)


class History:
    """The rows of a run's metrics.csv and steps.csv. A resumed run continues the files that it finds."""

    def __init__(self, run: RunFolder, workload: Workload, config: TrainConfig) -> None:
        self._run = run
        known = [figure for figure in workload.all_figures if not figure.needs or getattr(config, figure.needs)]
        self.figures = [*known, *TIMES]
        epochs = zip(read_numbers(run, METRICS_FILE, "epoch"), read_csv(run, METRICS_FILE), strict=True)
        self.rows: dict[float, dict[str, Any]] = {numbers["epoch"]: dict(row) for numbers, row in epochs}
        steps = read_numbers(run, STEPS_FILE, "step", "epoch")
        self._steps: list[Mapping[str, float]] = [{**row, "step": int(row["step"])} for row in steps]
        for row in itertools.chain(self.rows.values(), self._steps):
            self._note_logged(row)
        self.num_workers = 0  # in the last attempt; it may change in an elastic run

    def _note_logged(self, names: Iterable[str]) -> None:
        """Begin the column of a name that is logged for the first time."""
        self.figures += logged_figures(names, self.figures)

    @property
    def _columns(self) -> list[str]:
        return ["epoch", *(figure.name for figure in self.figures if {"epoch", "validation"} & {*figure.at})]

    def add(self, event: Event) -> None:
        """Record an event's values. If training restarts, drop the rows of the steps to be repeated."""
        match event:
            case Started():
                self.num_workers = event.num_workers
                self.rows = {epoch: row for epoch, row in self.rows.items() if epoch <= _place(event.epochs)}
                self._steps = [row for row in self._steps if row["step"] <= event.total_step]
                self._fill(event.epochs)
            case Progress():
                self._add_step(event)
            case Saved() if self._steps:  # at an epoch's end, after its last step
                last_row, more = self._steps[-1], seconds_of(event)
                self._steps[-1] = {**last_row, **{name: last_row.get(name, 0.0) + more[name] for name in more}}
            case EpochFinished(last):
                self._note_logged(last.logged)
                rows = [row for row in self._steps if last.epoch - 1 < row["epoch"] <= last.epoch]
                self._update(last.epoch, {**joined(rows, self.figures), **figures_of(event)})
            case Validated():
                self._note_logged(figures_of(event))
                self._update(event.epoch, figures_of(event))

    def _fill(self, last_epoch: float) -> None:
        """Add values from checkpoints for epochs whose events did not reach the job before it was killed."""
        for _, metrics in checkpoints_of(self._run):
            if metrics.step == 0 and 0 < metrics.epoch <= last_epoch:
                told, row = metrics.values, self.rows.get(metrics.epoch, {})
                if lacking := {name: told[name] for name in self._columns if name in told and not row.get(name)}:
                    self._update(metrics.epoch, lacking)

    def _update(self, epochs: float, values: Mapping[str, Any]) -> None:
        epoch = _place(epochs)
        places = {figure.name: figure.places for figure in self.figures if figure.places is not None}
        rounded = {name: round(values[name], number) for name, number in places.items() if name in values}
        self.rows.setdefault(epoch, {"epoch": epoch}).update({**values, **rounded})
        rows = [self.rows[epoch] for epoch in sorted(self.rows)]
        self._run.write_text(METRICS_FILE, csv_text(self._columns, rows))

    def _add_step(self, event: Progress) -> None:
        epochs = round(event.epoch - 1 + event.step / event.epoch_steps, 5)
        self._note_logged(event.logged)
        self._steps.append({"step": event.total_step, "epoch": epochs, **figures_of(event), **seconds_of(event)})
        if len(self._steps) > MAX_STEP_ROWS:
            self._steps = merged(self._steps, 2, self.figures)

    def write_steps(self) -> None:
        """Write steps.csv. Raises JobError."""
        columns = ["step", "epoch", *(figure.name for figure in self.figures if "step" in figure.at)]
        self._run.write_text(STEPS_FILE, csv_text(columns, self._steps))

    def mean_rate(self) -> float | None:
        """Return the mean examples/s of the epochs with a recorded rate (a kill may lose one); None without any."""
        rated = [row for row in self.rows.values() if row.get("epoch_s") and row.get(RATE)]
        seconds = sum(float(row["epoch_s"]) for row in rated)
        examples = sum(float(row[RATE]) * float(row["epoch_s"]) for row in rated)
        return round(examples / seconds, 1) if rated else None
