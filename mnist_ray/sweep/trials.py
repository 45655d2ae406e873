"""A sweep: its settings, the table of its trials, and its best configuration. Imports neither torch nor Ray."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mnist_ray.config import SweepConfig, WorkerConfig
from mnist_ray.errors import UsageError, format_value, in_words
from mnist_ray.report.run_files import csv_text, read_csv
from mnist_ray.run.job import Job
from mnist_ray.settings import Choice
from mnist_ray.storage import TRIALS_FILE, RunFolder
from mnist_ray.sweep.space import Point, Space
from mnist_ray.workload.base import Workload

BEST_FILE, DEFAULT_FOLDER = "best.json", "default"
DONE, STOPPED, FAILED, LOST, RUNNING, WAITING = "done", "stopped early", "failed", "lost", "running", "waiting"
FAILING = -math.inf  # the score of a trial that has failed
_ROUNDING = 1e-6  # of the epochs in sweep.csv
ENDED = (DONE, STOPPED, FAILED)  # a resumed sweep does not repeat these trials; it resumes others from checkpoints


@dataclass
class TrialRecord:
    """A trial; a row of sweep.csv."""

    trial: int  # counted from 1, in the order of starting
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


@dataclass(frozen=True)
class Best:
    """A configuration with its finished trials, one for each seed; if there are none, with those that were begun."""

    records: tuple[TrialRecord, ...]
    val_monitor: float  # mean over the seeds
    val_loss: float  # mean over the seeds

    @property
    def seeds_text(self) -> str:
        """The seeds over which the means are taken, in words."""
        number = len(self.records)
        return f"mean of {number} seeds" if number > 1 else f"seed {self.records[0].point.seed}"


def _averaged(records: Sequence[TrialRecord]) -> Best:
    """Return a configuration's means over its finished trials, one for each seed; if there are none, over all."""
    averaged = [record for record in records if record.state == DONE] or records
    means = [statistics.mean(getattr(record, name) for record in averaged) for name in ("val_monitor", "val_loss")]
    return Best(tuple(averaged), val_monitor=means[0], val_loss=means[1])


class TrialTable:
    """The records of a sweep's trials, by their points. Raises UsageError if a setting is named like another column."""

    def __init__(self, workload: type[Workload], space: Space, records: Iterable[TrialRecord] = ()) -> None:
        self.workload = workload(None)
        self._sign = 1 if self.workload.monitor.mode == "max" else -1
        self.space = space
        self.by_point = {record.point: record for record in records}
        monitor, *self._others = [f"val_{metric.name}" for metric in self.workload.metrics or (self.workload.monitor,)]
        names = {"val_monitor": monitor, "rate": self.workload.rate}
        fields = [field.name for field in dataclasses.fields(TrialRecord)[2:-1]]  # without trial, point and others
        self._columns = {name: names.get(name, name) for name in fields}  # of sweep.csv, by field
        if clash := {"trial", *self._columns.values(), *self._others} & space.spaces.keys():
            raise UsageError(f"sweep.csv has another column {clash.pop()}; rename the setting")

    def start(self, point: Point) -> TrialRecord:
        """Return the record of a point whose trial starts, or starts again."""
        record = self.by_point.setdefault(point, TrialRecord(len(self.by_point) + 1, point))
        record.state, record.reason = RUNNING, ""
        return record

    def finished(self) -> list[TrialRecord]:
        """Return the records of the trials that a resumed sweep does not repeat."""
        return [record for record in self.by_point.values() if record.state in ENDED]

    def count(self, *states: str) -> int:
        """Count the trials in one of the states."""
        return sum(record.state in states for record in self.by_point.values())

    def score_at(self, point: Point, epoch: float) -> float:
        """Return a trial's monitor at its first report from ``epoch`` on, negated if less is better.

        NaN if the trial has not come so far, FAILING if it has failed; if it has ended before, its last report.
        """
        record = self.by_point.get(point)
        if record is None or record.state in (FAILED, LOST):
            return math.nan if record is None else FAILING
        values = [value for at, value in record.reported if at > epoch - _ROUNDING]
        if not values and record.state in (RUNNING, WAITING):
            return math.nan
        value = values[0] if values else record.val_monitor
        return FAILING if math.isnan(value) else self._sign * value

    def worth(self, trials: TrialRecord | Best) -> tuple[float, float]:
        """Return a sort key that is larger for better trials: the workload's monitor, then the loss."""
        return self._sign * trials.val_monitor, -trials.val_loss

    @property
    def ranked(self) -> list[TrialRecord]:
        """All records, best first; trials that failed or were not validated come last."""
        validated = [record for record in self.by_point.values() if record.is_validated]
        others = [record for record in self.by_point.values() if not record.is_validated]
        return sorted(validated, key=self.worth, reverse=True) + others

    @property
    def best(self) -> Best | None:
        """The best configuration so far, by the mean over its seeds; None before the first validation.

        Configurations with a failed trial come last. Configurations with more finished trials come first: values of
        different epochs are not compared. A later seed is ignored if the time was up before all had finished it.
        """
        by_configuration: dict[Any, list[TrialRecord]] = {}
        for record in self._comparable():
            by_configuration.setdefault(record.point.configuration, []).append(record)
        failed = {record.point.configuration for record in self.by_point.values() if record.state == FAILED}

        def rank(best: Best) -> tuple[bool, int, tuple[float, float]]:
            num_done = sum(record.state == DONE for record in best.records)
            return best.records[0].point.configuration not in failed, num_done, self.worth(best)

        return max(map(_averaged, by_configuration.values()), key=rank, default=None)

    def _comparable(self) -> list[TrialRecord]:
        """Return the validated trials, except those of later seeds for which the time was up."""
        stopped = {record.point.seed for record in self.by_point.values() if record.state == STOPPED}
        cut_off = stopped - {min((point.seed for point in self.by_point), default=0)}
        return [record for record in self.by_point.values() if record.is_validated and record.point.seed not in cut_off]

    def finalists(self, sweep: SweepConfig, seed: int) -> list[Point]:
        """Return the best configurations, and the default one if it was tried: those to train with more seeds.

        From seed to seed, the metric of a good configuration varies more than good configurations differ. So the best
        of many single runs is mostly the luckiest.
        """
        if sweep.num_confirmed == 0:
            return []
        done = [record.point for record in self.ranked if record.state == DONE and record.point.seed == seed]
        chosen = done[: sweep.num_confirmed]
        return chosen + [point for point in self.space.default_points(seed) if point in done and point not in chosen]

    def kept(self, sweep: SweepConfig, seed: int) -> set[Point]:
        """Return the points whose checkpoints may be tested at the end: the default one, and those that may be best."""
        best = self.best
        leading = [best.records[0].point] if best else []
        return {*leading, *self.finalists(sweep, seed), *self.space.default_points(seed)}

    def result_of(self, point: Point) -> TrialRecord | None:
        """Return a finished trial if its last whole epoch was its best, which ``train.py`` would test; else None."""
        record = self.by_point.get(point)
        if record is None or record.state != DONE:
            return None
        *before, last = [self._sign * value for at, value in record.reported if at == round(at)]
        return record if last > max(before, default=-math.inf) else None

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
        """The rows of sweep.csv, one per trial in the order of starting."""
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
            required = {*self._all_columns} - {*self._others}  # the workload may have got more metrics
            records = [self._record(row) for row in read_csv(run, TRIALS_FILE, required)]
        except (ValueError, TypeError) as error:
            raise run.damaged(TRIALS_FILE, error) from error
        return TrialTable(type(self.workload), self.space, records)

    def _record(self, row: dict[str, str]) -> TrialRecord:
        record = TrialRecord(int(row["trial"]), self.space.point(row, int(row["seed"])))
        self.update(record, row)
        _ = record.reported  # raises now, not later, if it is damaged
        return record

    @property
    def console_columns(self) -> tuple[str, ...]:
        """The columns of the table on the console."""
        searched = map(in_words, self.space.spaces)
        return ("trial", *searched, "seed", "epochs", self.workload.monitor.name, f"{self.workload.nouns}/s", "state")

    def console_row(self, record: TrialRecord, num_epochs: int) -> tuple[str, ...]:
        """Return a trial's row under ``console_columns``."""
        return (
            str(record.trial),
            *map(format_value, record.point.values.values()),
            str(record.point.seed),
            f"{record.epochs:.3g}/{num_epochs}",
            self.workload.monitor.format(record.val_monitor),
            "-" if math.isnan(record.rate) else f"{record.rate:,.0f}",
            record.state + (f": {record.reason}" if record.reason else ""),
        )


@dataclass(frozen=True)
class Sweep:
    """All settings of a sweep."""

    config: SweepConfig
    space: Space
    job: Job  # the job of all trials, and of the training at the end
    num_validation: int = 0  # validation examples; 0 until the data are loaded

    @property
    def workers(self) -> WorkerConfig:
        """The workers of a trial; by default one worker with one core, as parallel trials gain more than threads."""
        own = self.job.workers
        return dataclasses.replace(own, num_workers=own.num_workers or 1, cpus_per_worker=own.cpus_per_worker or 1)

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
