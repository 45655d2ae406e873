"""What a sweep tries, and what came of it: points of the search space, records of trials. No Ray here."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mnist_ray.config import SweepConfig, TrainConfig
from mnist_ray.errors import UsageError


@dataclass(frozen=True)
class Point:
    """What one trial tries: a choice of the hyperparameters that are searched, and the seed to train it with."""

    batch_size: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The trial's folder."""
        return f"batch-{self.batch_size}_lr-{self.learning_rate!r}_seed-{self.seed}"

    @property
    def configuration(self) -> tuple[int, float]:
        """What is the same for all seeds: batch size, learning rate."""
        return self.batch_size, self.learning_rate

    def applied_to(self, config: TrainConfig) -> TrainConfig:
        """Return ``config`` with this choice."""
        return dataclasses.replace(config, **dataclasses.asdict(self))


def first_points(sweep: SweepConfig, seed: int) -> list[Point]:
    """Return the default configuration where the search space holds it: what the others have to beat."""
    default = TrainConfig()
    is_inside = sweep.learning_rate_min <= default.learning_rate <= sweep.learning_rate_max
    if default.batch_size in sweep.batch_sizes and is_inside:
        return [Point(default.batch_size, default.learning_rate, seed)]
    return []


def propose(sweep: SweepConfig, seed: int) -> list[Point]:
    """Return the points of a random or grid search, all at once; the same for the same settings and seed.

    Raises UsageError where a grid has no trial for each batch size.
    """
    if sweep.search == "grid":
        return _grid(sweep, seed)
    rng = np.random.default_rng(seed)
    low, high = math.log(sweep.learning_rate_min), math.log(sweep.learning_rate_max)
    drawn = [
        Point(int(rng.choice(sweep.batch_sizes)), float(f"{math.exp(rng.uniform(low, high)):.4g}"), seed)
        for _ in range(sweep.num_trials)
    ]
    return (first_points(sweep, seed) + drawn)[: sweep.num_trials]


def _grid(sweep: SweepConfig, seed: int) -> list[Point]:
    num_rates = sweep.num_trials // len(sweep.batch_sizes)
    if num_rates == 0:
        raise UsageError(f"--search grid needs a trial for each of the {len(sweep.batch_sizes)} batch sizes")
    rates = np.geomspace(sweep.learning_rate_min, sweep.learning_rate_max, num_rates)
    return [Point(size, float(f"{rate:.4g}"), seed) for rate in rates for size in sweep.batch_sizes]


def confirmations(sweep: SweepConfig, seed: int, table: TrialTable) -> list[Point]:
    """Return the best configurations with two more seeds each, the default among them where it was tried.

    Good configurations differ by less than one run's validation accuracy does from seed to seed; the best of many
    single runs is mostly the luckiest.
    """
    if sweep.num_confirmed == 0:
        return []
    done = [record.point for record in table.ranked if record.state == DONE and record.seed == seed]
    chosen = done[: sweep.num_confirmed]
    chosen += [point for point in first_points(sweep, seed) if point in done and point not in chosen]
    return [dataclasses.replace(point, seed=seed + more) for more in (1, 2) for point in chosen]


def contenders(sweep: SweepConfig, seed: int, table: TrialTable) -> set[Point]:
    """Return the points that belong to configurations which may come out as the best, as things stand."""
    best = TrialTable(record for record in table.by_point.values() if record.is_finished).best
    leading = [*confirmations(sweep, seed, table), *(record.point for record in (best or Choice(())).records)]
    configurations = {point.configuration for point in leading}
    return {point for point in table.by_point if point.configuration in configurations}


DONE, STOPPED, FAILED, RUNNING = "done", "stopped early", "failed", "running"


@dataclass
class TrialRecord:
    """What is known of one trial; a row of sweep.csv."""

    trial: int
    """Counted from 1, in the order of starting."""
    batch_size: int
    learning_rate: float
    seed: int
    state: str = RUNNING
    epochs: float = 0.0
    """Epochs trained; a fraction within one."""
    val_accuracy: float = math.nan
    val_loss: float = math.nan
    train_loss: float = math.nan
    images_per_s: float = math.nan
    train_s: float = 0.0
    """Seconds of training, without validation."""
    reason: str = ""
    """Why it failed."""

    @property
    def point(self) -> Point:
        """What the trial tries."""
        return Point(self.batch_size, self.learning_rate, self.seed)

    @property
    def is_finished(self) -> bool:
        """Whether a resumed sweep leaves it alone."""
        return self.state != RUNNING

    @property
    def score(self) -> tuple[float, float]:
        """By which trials are ranked: validation accuracy, then loss. NaN ranks last."""
        if math.isnan(self.val_accuracy) or self.state == FAILED:
            return (-1.0, -math.inf)
        return (self.val_accuracy, -self.val_loss)


@dataclass(frozen=True)
class Choice:
    """A configuration with all its validated trials, one a seed."""

    records: tuple[TrialRecord, ...]

    @property
    def val_accuracy(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(record.val_accuracy for record in self.records)

    @property
    def rank(self) -> tuple[int, float, float]:
        """What was tried with more seeds comes first, then mean validation accuracy decides, then mean loss."""
        return len(self.records), self.val_accuracy, -statistics.mean(record.val_loss for record in self.records)


class TrialTable:
    """The records of a sweep's trials, by their points."""

    def __init__(self, records: Iterable[TrialRecord] = ()) -> None:
        self.by_point = {record.point: record for record in records}
        self.num_planned = len(self.by_point)

    def start(self, point: Point) -> TrialRecord:
        """Return the record of a point whose trial starts, or starts again."""
        if point not in self.by_point:
            self.by_point[point] = TrialRecord(len(self.by_point) + 1, **dataclasses.asdict(point))
        record = self.by_point[point]
        record.state, record.reason = RUNNING, ""
        return record

    def is_finished(self, point: Point) -> bool:
        """Whether a point's trial has ended, and is not to be repeated."""
        return point in self.by_point and self.by_point[point].is_finished

    @property
    def ranked(self) -> list[TrialRecord]:
        """All records, the best first."""
        return sorted(self.by_point.values(), key=lambda record: record.score, reverse=True)

    @property
    def best(self) -> Choice | None:
        """The best configuration so far; None before the first validation."""
        by_configuration: dict[tuple[int, float], list[TrialRecord]] = {}
        for record in self.by_point.values():
            if record.score[0] >= 0:
                by_configuration.setdefault(record.point.configuration, []).append(record)
        choices = [Choice(tuple(records)) for records in by_configuration.values()]
        return max(choices, key=lambda choice: choice.rank, default=None)

    def count(self, *states: str) -> int:
        """Count the trials in one of the states."""
        return sum(record.state in states for record in self.by_point.values())

    def epochs_run(self) -> float:
        """Epochs that were really trained, over all trials."""
        return sum(record.epochs for record in self.by_point.values())

    def to_csv(self) -> str:
        """Return sweep.csv: a row per trial in the order of starting."""
        text = io.StringIO()
        names = [field.name for field in dataclasses.fields(TrialRecord)]
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(record) for record in self.by_point.values())
        return text.getvalue()

    @classmethod
    def from_csv(cls, text: str) -> TrialTable:
        """Read what ``to_csv`` wrote. Raises UsageError where it is something else."""
        fields = dataclasses.fields(TrialRecord)
        kinds = {"int": int, "float": float, "str": str}
        try:
            rows = [
                {field.name: kinds[str(field.type)](row[field.name]) for field in fields}
                for row in csv.DictReader(io.StringIO(text))
            ]
        except (KeyError, ValueError, TypeError) as error:
            raise UsageError(f"sweep.csv is damaged: {error}") from error
        return cls(TrialRecord(**row) for row in rows)


TRIAL_COLUMNS = ("trial", "batch size", "learning rate", "seed", "epochs", "accuracy", "images/s", "state")


def row_of(record: TrialRecord, num_epochs: int) -> tuple[str, ...]:
    """Return what a person reads of a trial, in the order of ``TRIAL_COLUMNS``."""
    return (
        str(record.trial),
        str(record.batch_size),
        f"{record.learning_rate:g}",
        str(record.seed),
        f"{record.epochs:.3g}/{num_epochs}",
        "-" if math.isnan(record.val_accuracy) else f"{record.val_accuracy:.2%}",
        "-" if math.isnan(record.images_per_s) else f"{record.images_per_s:,.0f}",
        record.state + (f": {record.reason}" if record.reason else ""),
    )
