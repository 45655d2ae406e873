"""Which trials and configurations of a sweep are better, and which of them may still be chosen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mnist_ray.sweep.space import Point
from mnist_ray.sweep.trials import DONE, FAILED, LOST, RUNNING, STOPPED, WAITING, TrialRecord, TrialTable

FAILING = -math.inf  # the score of a trial that has failed
_ROUNDING = 1e-6  # of the epochs in sweep.csv


@dataclass(frozen=True)
class Averaged:
    """A configuration with its finished trials, one for each seed; if there are none, with those that have begun."""

    records: tuple[TrialRecord, ...]
    val_monitor: float  # mean over the seeds
    val_loss: float  # mean over the seeds

    @property
    def point(self) -> Point:
        """The configuration with its first seed."""
        return self.records[0].point

    @property
    def seeds_text(self) -> str:
        """The seeds over which the means are taken, in words."""
        number = len(self.records)
        return f"mean of {number} seeds" if number > 1 else f"seed {self.point.seed}"


class _Rank(NamedTuple):
    """Decides between two configurations by the first difference; the larger one is better."""

    has_no_failure: bool  # with any seed
    num_done: int  # finished trials: values at different epochs are not comparable
    monitor: float  # mean over the seeds, negated if lower is better
    negative_loss: float  # mean over the seeds


def find_best(table: TrialTable) -> Averaged | None:
    """Return the best configuration so far, by the mean over its seeds; None before the first validation.

    A later seed is ignored if time ran out before all configurations had finished it.
    """
    records = table.by_point.values()
    failed = {record.point.configuration for record in records if record.state == FAILED}
    first_seed = min((point.seed for point in table.by_point), default=0)
    cut_off = {record.point.seed for record in records if record.state == STOPPED} - {first_seed}
    by_configuration: dict[Any, list[TrialRecord]] = {}
    for record in records:
        if record.is_validated and record.point.seed not in cut_off:
            by_configuration.setdefault(record.point.configuration, []).append(record)

    def rank(trials: Averaged) -> _Rank:
        num_done = sum(record.state == DONE for record in trials.records)
        return _Rank(trials.point.configuration not in failed, num_done, *_worth(table, trials))

    return max(map(_averaged, by_configuration.values()), key=rank, default=None)


def _averaged(trials: Sequence[TrialRecord]) -> Averaged:
    records = [record for record in trials if record.state == DONE] or trials
    means = (statistics.mean(getattr(record, name) for record in records) for name in ("val_monitor", "val_loss"))
    return Averaged(tuple(records), *means)


def _worth(table: TrialTable, trials: TrialRecord | Averaged) -> tuple[float, float]:
    """Return a sort key that is larger for better trials: the workload's monitor, then the loss."""
    return _signed(table, trials.val_monitor), -trials.val_loss


def _signed(table: TrialTable, monitor: float) -> float:
    return monitor if table.workload.monitor.mode == "max" else -monitor


def ranked(table: TrialTable) -> list[TrialRecord]:
    """Return all records, best first; trials that failed or were not validated come last."""
    validated = [record for record in table.by_point.values() if record.is_validated]
    others = [record for record in table.by_point.values() if not record.is_validated]
    return sorted(validated, key=lambda record: _worth(table, record), reverse=True) + others


def score_at(table: TrialTable, point: Point, epoch: float) -> float:
    """Return a trial's monitor at its first report from ``epoch`` on, negated if lower is better.

    NaN if the trial has not reached the epoch yet; FAILING if it has failed; its last value if it ended before.
    """
    record = table.by_point.get(point)
    if record is None:
        return math.nan
    if record.state in (FAILED, LOST):
        return FAILING
    values = [value for at, value in record.reported if at > epoch - _ROUNDING]
    if not values and record.state in (RUNNING, WAITING):
        return math.nan
    value = values[0] if values else record.val_monitor
    return FAILING if math.isnan(value) else _signed(table, value)


def unreached(table: TrialTable, points: Iterable[Point], epoch: float) -> list[Point]:
    """Return the points whose trials have not reached an epoch yet."""
    return [point for point in points if math.isnan(score_at(table, point, epoch))]


def finalists(table: TrialTable, num_confirmed: int, seed: int) -> list[Point]:
    """Return the best configurations, and the default one if it was tried: those to train with more seeds.

    A good configuration's metric varies more between seeds than it differs from those of other good configurations. So
    the best of many single runs is usually the luckiest.
    """
    if num_confirmed == 0:
        return []
    done = [record.point for record in ranked(table) if record.state == DONE and record.point.seed == seed]
    chosen = done[:num_confirmed]
    return chosen + [point for point in table.space.default_points(seed) if point in done and point not in chosen]


def may_be_tested(table: TrialTable, num_confirmed: int, seed: int) -> set[Point]:
    """Return the points whose checkpoints may be tested at the end: the default one, and those that may be best."""
    leading = [best.point] if (best := find_best(table)) else []
    return {*leading, *finalists(table, num_confirmed, seed), *table.space.default_points(seed)}


def result_of(table: TrialTable, point: Point) -> TrialRecord | None:
    """Return a finished trial if its last whole epoch was its best, which ``train.py`` would test; else None."""
    record = table.by_point.get(point)
    if record is None or record.state != DONE:
        return None
    *before, last = [_signed(table, value) for at, value in record.reported if at == round(at)]
    return record if last > max(before, default=-math.inf) else None
