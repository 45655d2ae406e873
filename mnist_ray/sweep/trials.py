"""A sweep: its settings, and the records of its trials, which sweep.csv holds. Imports neither torch nor Ray."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mnist_ray.config import SweepConfig, WorkerConfig
from mnist_ray.errors import UsageError
from mnist_ray.job.job import Job
from mnist_ray.report.run_files import csv_text, read_csv
from mnist_ray.settings import Choice
from mnist_ray.storage import TRIALS_FILE, RunFolder
from mnist_ray.sweep.space import Point, Space
from mnist_ray.workload.base import Workload
from mnist_ray.workload.figures import RATE

BEST_FILE, DEFAULT_FOLDER = "best.json", "default"
DONE, STOPPED, FAILED, LOST, RUNNING, WAITING = "done", "stopped early", "failed", "lost", "running", "waiting"
ENDED = (DONE, STOPPED, FAILED)  # a resumed sweep does not repeat these trials; it resumes others from checkpoints


@dataclass
class TrialRecord:
    """A trial; a row of sweep.csv."""

    trial: int  # counted from 1, in the order in which they start
    point: Point
    state: str = RUNNING
    epochs: float = 0.0  # epochs trained; not always a whole number
    val_monitor: float = math.nan  # the workload's monitor on the validation set
    val_loss: float = math.nan
    train_loss: float = math.nan
    rate: float = math.nan  # examples per second of training
    train_s: float = 0.0  # seconds of training, without validation
    reports: str = ""  # `EPOCHS:MONITOR` for each report: trials are compared by them
    reason: str = ""  # of a failed or lost trial
    others: dict[str, float] = dataclasses.field(default_factory=dict)  # other metrics on the validation set, by column

    def add_report(self, epochs: float, monitor: float) -> None:
        """Add a report. A trial that resumes from its checkpoint may report the same epochs again."""
        known = [pair for pair in self.reported if pair[0] < epochs]
        self.reports = " ".join(f"{at:.9g}:{value:.9g}" for at, value in [*known, (epochs, monitor)])

    @property
    def reported(self) -> list[tuple[float, float]]:
        """The epochs and the monitor of each report. Raises ValueError if ``reports`` is damaged."""
        pairs = [pair.split(":") for pair in self.reports.split()]
        return [(float(epochs), float(monitor)) for epochs, monitor in pairs]

    @property
    def is_validated(self) -> bool:
        """Whether the trial can be compared with other trials."""
        return not math.isnan(self.val_monitor) and self.state not in (FAILED, LOST)


class TrialTable:
    """The records of a sweep's trials, by their points. Raises UsageError if a setting is named like another column."""

    def __init__(self, workload: type[Workload], space: Space, records: Iterable[TrialRecord] = ()) -> None:
        self.workload = workload(None)
        self.space = space
        self.by_point = {record.point: record for record in records}
        monitor, *self._others = [f"val_{metric.name}" for metric in self.workload.metrics or (self.workload.monitor,)]
        names = {"val_monitor": monitor, "rate": RATE}
        fields = [field.name for field in dataclasses.fields(TrialRecord)[2:-1]]  # without trial, point and others
        self._columns = {name: names.get(name, name) for name in fields}  # of sweep.csv, by field
        if clash := {"trial", *self._columns.values(), *self._others} & space.spaces.keys():
            raise UsageError(f"sweep.csv has another column {clash.pop()}; rename the setting")

    def start(self, point: Point) -> TrialRecord:
        """Return the record of a point whose trial starts, or starts again."""
        record = self.by_point.setdefault(point, TrialRecord(len(self.by_point) + 1, point))
        record.state, record.reason = RUNNING, ""
        return record

    def count(self, *states: str) -> int:
        """Count the trials in one of the states."""
        return sum(record.state in states for record in self.by_point.values())

    def outcome(self, record: TrialRecord) -> dict[str, Any]:
        """Return the results of a trial, by the columns of sweep.csv."""
        others = {column: record.others.get(column, math.nan) for column in self._others}
        return {column: getattr(record, name) for name, column in self._columns.items()} | others

    def update(self, record: TrialRecord, results: Mapping[str, Any]) -> None:
        """Set the results that a trial has reported, or a row of sweep.csv. Raises ValueError if one is damaged."""
        for name, column in self._columns.items():
            if column in results:
                setattr(record, name, type(getattr(record, name))(results[column]))
        record.others |= {column: float(results[column]) for column in self._others if column in results}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of sweep.csv, one per trial, in the order in which they started."""
        return [
            {"trial": record.trial, **record.point.values, "seed": record.point.seed, **self.outcome(record)}
            for record in self.by_point.values()
        ]

    @property
    def _all_columns(self) -> list[str]:
        first = ["state", "epochs", self._columns["val_monitor"], *self._others]
        return ["trial", *self.space.spaces, "seed", *dict.fromkeys([*first, *self._columns.values()])]

    def to_csv(self) -> str:
        """Return sweep.csv."""
        return csv_text(self._all_columns, self.rows, has_header=True)

    def read(self, run: RunFolder) -> TrialTable:
        """Return the table in a sweep's folder; an empty one if there is none. Raises JobError."""
        try:
            required = {*self._all_columns} - {*self._others}  # the workload may have more metrics since then
            records = [self._record(row) for row in read_csv(run, TRIALS_FILE, required)]
        except (ValueError, TypeError) as error:
            raise run.damaged(TRIALS_FILE, error) from error
        return TrialTable(type(self.workload), self.space, records)

    def _record(self, row: dict[str, str]) -> TrialRecord:
        record = TrialRecord(int(row["trial"]), self.space.point(row, int(row["seed"])))
        self.update(record, row)
        _ = record.reported  # raises now, not later, if it is damaged
        return record


@dataclass(frozen=True)
class Sweep:
    """All settings of a sweep."""

    config: SweepConfig
    space: Space
    job: Job  # the job of all trials, and of the training at the end
    num_validation: int = 0  # validation examples; 0 until the data are loaded

    @property
    def workers(self) -> WorkerConfig:
        """The workers of a trial."""
        return self.job.workers.of_many

    @property
    def batch_sizes(self) -> list[int]:
        """The batch sizes to try; for a range, its two ends. Empty if the batch size is not searched."""
        space = self.space.spaces.get("batch_size")
        if space is None:
            return []
        return list(space.options) if isinstance(space, Choice) else [int(space.low), int(space.high)]

    def table(self) -> TrialTable:
        """Return the table of the trials in the sweep's folder. Raises JobError."""
        return TrialTable(type(self.job.workload), self.space).read(self.job.run)
