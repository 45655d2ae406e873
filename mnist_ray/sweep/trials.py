"""What came of a sweep's trials, and which configuration is the best. No Ray here."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mnist_ray.config import SweepConfig
from mnist_ray.errors import format_value, in_words
from mnist_ray.report.run_files import read_csv
from mnist_ray.settings import Choice
from mnist_ray.storage import TRIALS_FILE, RunFolder
from mnist_ray.sweep.space import Point, Space
from mnist_ray.workload.base import Workload

DONE, STOPPED, FAILED, LOST, RUNNING = "done", "stopped early", "failed", "lost", "running"
ENDED = (DONE, STOPPED, FAILED)  # what a resumed sweep leaves alone; the others go on, from their checkpoints


@dataclass
class TrialRecord:
    """What is known of one trial; a row of sweep.csv."""

    trial: int  # counted from 1, in the order of starting
    point: Point
    state: str = RUNNING
    epochs: float = 0.0  # epochs trained; a fraction within one
    val_monitor: float = math.nan  # what the workload chooses by, on the validation set
    val_loss: float = math.nan
    train_loss: float = math.nan
    rate: float = math.nan  # examples per second of training
    train_s: float = 0.0  # seconds of training, without validation
    reports: str = ""  # what it has reported, as `EPOCHS:CRITERION` each: a scheduler compares trials by it
    reason: str = ""  # why it failed, or was lost: its processes have died too often

    def report(self, epochs: float, monitor: float) -> None:
        """Note what it has reported; of a trial that goes on from its checkpoint, what it reports again replaces it."""
        known = [pair for pair in self.reported if pair[0] < epochs]
        self.reports = " ".join(f"{at:g}:{value:.9g}" for at, value in [*known, (epochs, monitor)])

    @property
    def reported(self) -> list[tuple[float, float]]:
        """What it has reported: epochs, and the monitor then. Raises ValueError where that is damaged."""
        pairs = [pair.split(":") for pair in self.reports.split()]
        return [(float(epochs), float(monitor)) for epochs, monitor in pairs]

    @property
    def is_finished(self) -> bool:
        """Whether a resumed sweep leaves it alone."""
        return self.state in ENDED

    @property
    def is_validated(self) -> bool:
        """Whether it can be compared with others."""
        return not math.isnan(self.val_monitor) and self.state not in (FAILED, LOST)


@dataclass(frozen=True)
class Best:
    """A configuration with all its validated trials, one a seed."""

    records: tuple[TrialRecord, ...]

    @property
    def configuration(self) -> tuple[tuple[str, Any], ...]:
        """What they have in common."""
        return self.records[0].point.configuration

    @property
    def val_monitor(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(record.val_monitor for record in self.records)

    @property
    def val_loss(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(record.val_loss for record in self.records)

    @property
    def seeds_text(self) -> str:
        """Of which seeds the means are, for people."""
        number = len(self.records)
        return f"mean of {number} seeds" if number > 1 else f"seed {self.records[0].point.seed}"


class TrialTable:
    """The records of a sweep's trials, by their points."""

    def __init__(self, workload: type[Workload], space: Space, records: Iterable[TrialRecord] = ()) -> None:
        self.workload = workload(None)
        self.space = space
        self.by_point = {record.point: record for record in records}
        self.num_planned = len(self.by_point)

    def start(self, point: Point) -> TrialRecord:
        """Return the record of a point whose trial starts, or starts again."""
        if point not in self.by_point:
            self.by_point[point] = TrialRecord(len(self.by_point) + 1, point)
        record = self.by_point[point]
        record.state, record.reason = RUNNING, ""
        return record

    def is_finished(self, point: Point) -> bool:
        """Whether a point's trial has ended, and is not to be repeated."""
        return point in self.by_point and self.by_point[point].is_finished

    def worth(self, trials: TrialRecord | Best) -> tuple[float, float]:
        """Return by what trials are ranked: what the workload chooses by, then loss; more is better."""
        sign = 1 if self.workload.monitor.mode == "max" else -1
        return sign * trials.val_monitor, -trials.val_loss

    def rank(self, records: Iterable[TrialRecord]) -> list[TrialRecord]:
        """Return records, the best first; those that were not validated, or failed, last."""
        records = list(records)
        known = [record for record in records if record.is_validated]
        unknown = [record for record in records if not record.is_validated]
        return sorted(known, key=self.worth, reverse=True) + unknown

    @property
    def ranked(self) -> list[TrialRecord]:
        """All records, the best first."""
        return self.rank(self.by_point.values())

    @property
    def best(self) -> Best | None:
        """The best configuration so far; None before the first validation.

        What was tried with more seeds comes first, then the mean over the seeds decides.
        """
        return self.best_of(self.by_point.values())

    def best_of(self, records: Iterable[TrialRecord]) -> Best | None:
        """Return the best configuration of some records."""
        by_configuration: dict[Any, list[TrialRecord]] = {}
        for record in records:
            if record.is_validated:
                by_configuration.setdefault(record.point.configuration, []).append(record)
        candidates = [Best(tuple(records)) for records in by_configuration.values()]
        return max(candidates, key=lambda best: (len(best.records), *self.worth(best)), default=None)

    def confirmations(self, sweep: SweepConfig, seed: int) -> list[Point]:
        """Return the best configurations with two more seeds each, the default among them where it was tried.

        Good configurations differ by less than one run's validation does from seed to seed; the best of many single
        runs is mostly the luckiest.
        """
        if sweep.num_confirmed == 0:
            return []
        done = [record.point for record in self.ranked if record.state == DONE and record.point.seed == seed]
        chosen = done[: sweep.num_confirmed]
        chosen += [point for point in self.space.default_points(seed) if point in done and point not in chosen]
        return [dataclasses.replace(point, seed=seed + more) for more in (1, 2) for point in chosen]

    def contenders(self, sweep: SweepConfig, seed: int) -> set[Point]:
        """Return the points that belong to configurations which may come out as the best, as things stand."""
        best = self.best_of(record for record in self.by_point.values() if record.is_finished)
        leading = [*self.confirmations(sweep, seed), *(record.point for record in (best.records if best else ()))]
        configurations = {point.configuration for point in leading}
        return {point for point in self.by_point if point.configuration in configurations}

    def count(self, *states: str) -> int:
        """Count the trials in one of the states."""
        return sum(record.state in states for record in self.by_point.values())

    @property
    def columns(self) -> dict[str, str]:
        """The columns of sweep.csv that are no searched settings: column to field of ``TrialRecord``."""
        return {
            "state": "state",
            "epochs": "epochs",
            f"val_{self.workload.monitor.name}": "val_monitor",
            "val_loss": "val_loss",
            "train_loss": "train_loss",
            self.workload.rate: "rate",
            "train_s": "train_s",
            "reports": "reports",
            "reason": "reason",
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What sweep.csv holds: a row per trial in the order of starting."""
        return [
            {"trial": record.trial, **record.point.values, "seed": record.point.seed, **self.outcome(record)}
            for record in self.by_point.values()
        ]

    def outcome(self, record: TrialRecord) -> dict[str, Any]:
        """Return what has come of a trial, by the columns of sweep.csv."""
        return {column: getattr(record, name) for column, name in self.columns.items()}

    def to_csv(self) -> str:
        """Return sweep.csv."""
        text = io.StringIO()
        writer = csv.DictWriter(text, ["trial", *self.space.spaces, "seed", *self.columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def read(self, run: RunFolder) -> TrialTable:
        """Return the table that a sweep has written, an empty one where it has not. Raises DamagedFileError."""
        try:
            columns = ["trial", *self.space.spaces, "seed", *self.columns]
            records = [self._record(row) for row in read_csv(run, TRIALS_FILE, columns)]
        except (ValueError, TypeError) as error:
            raise run.damaged(TRIALS_FILE, error) from error
        return TrialTable(type(self.workload), self.space, records)

    def _record(self, row: dict[str, str]) -> TrialRecord:
        values: dict[str, Any] = {
            name: row.get(column, "") if name in ("state", "reports", "reason") else float(row[column])
            for column, name in self.columns.items()
        }
        point = self.space.point(row, int(row["seed"]))
        for name, space in self.space.spaces.items():
            if isinstance(space, Choice) and point.values[name] not in space.options:
                raise ValueError(f"{in_words(name)} {point.values[name]} is none of the sweep's")
        if values["state"] not in (*ENDED, LOST, RUNNING):
            raise ValueError(f"{values['state']!r:.40} is no state of a trial")
        record = TrialRecord(int(row["trial"]), point, **values)
        _ = record.reported  # else a damaged one would only fail later
        return record

    @property
    def console_columns(self) -> tuple[str, ...]:
        """What people see of each trial."""
        searched = map(in_words, self.space.spaces)
        return ("trial", *searched, "seed", "epochs", self.workload.monitor.name, f"{self.workload.nouns}/s", "state")

    def console_row(self, record: TrialRecord, num_epochs: int) -> tuple[str, ...]:
        """Return what a person reads of a trial, in the order of ``console_columns``."""
        return (
            str(record.trial),
            *map(format_value, record.point.values.values()),
            str(record.point.seed),
            f"{record.epochs:.3g}/{record.point.values.get('num_epochs', num_epochs)}",
            self.workload.monitor.format(record.val_monitor),
            "-" if math.isnan(record.rate) else f"{record.rate:,.0f}",
            record.state + (f": {record.reason}" if record.reason else ""),
        )
