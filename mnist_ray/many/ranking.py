"""Which members and configurations are better, and which of them race."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mnist_ray.many.points import Configuration, Point
from mnist_ray.many.table import Many, Member, Table
from mnist_ray.report.run_files import DONE, FAILED, LOST, RUNNING, WAITING
from mnist_ray.text import count

FAILING = -math.inf  # the score of a member that has failed
_ROUNDING = 1e-6  # of the epochs in members.csv


@dataclass(frozen=True)
class Averaged:
    """A configuration with its finished members; if there are none, with those that have begun."""

    members: tuple[Member, ...]
    val_monitor: float  # mean over the members
    val_loss: float  # mean over the members

    @property
    def configuration(self) -> Configuration:
        """The searched settings' values."""
        return self.members[0].point.configuration

    @property
    def mean_of(self) -> str:
        """The members over which the means are taken, in words."""
        if len(self.members) == 1:
            return self.members[0].point.label
        return f"mean of {count(len(self.members), 'run' if self.members[0].point.fold else 'seed')}"


def find_best(table: Table) -> Averaged | None:
    """Return the best configuration so far, by the mean over its members; None before the first validation.

    Values at different epochs are not comparable: more finished members win, and none that has failed.
    """
    members = table.by_point.values()
    failed = {member.point.configuration for member in members if member.state == FAILED}
    by_configuration: dict[Configuration, list[Member]] = {}
    for member in members:
        if table.is_validated(member):
            by_configuration.setdefault(member.point.configuration, []).append(member)

    def rank(each: Averaged) -> tuple[bool, int, tuple[float, float]]:
        num_done = sum(member.state == DONE for member in each.members)
        return each.configuration not in failed, num_done, _worth(table, each.val_monitor, each.val_loss)

    return max((_averaged(table, each) for each in by_configuration.values()), key=rank, default=None)


def averaged(table: Table, configuration: Configuration) -> Averaged | None:
    """Return a configuration with the means over its members; None if none of them is validated."""
    members = [member for member in table.by_point.values() if member.point.configuration == configuration]
    validated = [member for member in members if table.is_validated(member)]
    return _averaged(table, validated) if validated else None


def is_racing(many: Many, point: Point) -> bool:
    """Return whether the race has added a point."""
    return point.seed >= many.job.train.seed + many.job.train.num_seeds


def _averaged(table: Table, members: Sequence[Member]) -> Averaged:
    done = [member for member in members if member.state == DONE] or members
    val_monitor = statistics.mean(map(table.value, done))
    return Averaged(tuple(done), val_monitor, statistics.mean(member.figures["val_loss"] for member in done))


def _worth(table: Table, monitor: float, loss: float) -> tuple[float, float]:
    """Return a sort key that is larger for better values: the workload's monitor, then the loss."""
    return _signed(table, monitor), -loss


def _signed(table: Table, monitor: float) -> float:
    return monitor if table.workload.monitor.mode == "max" else -monitor


def ranked(table: Table) -> list[Member]:
    """Return all members, best first; those that failed or were not validated come last."""
    members = table.by_point.values()
    validated = [member for member in members if table.is_validated(member)]
    validated.sort(key=lambda each: _worth(table, table.value(each), each.figures["val_loss"]), reverse=True)
    return [*validated, *(member for member in members if not table.is_validated(member))]


def score_at(table: Table, points: Sequence[Point], epoch: float) -> float:
    """Return the mean of the members' monitors at their first reports from ``epoch`` on, negated if lower is better.

    NaN if one has not reached the epoch yet; FAILING if one has failed; the last value of one that ended before.
    """
    scores = [_score_at(table, point, epoch) for point in points]
    return FAILING if FAILING in scores else statistics.mean(scores)


def _score_at(table: Table, point: Point, epoch: float) -> float:
    member = table.by_point.get(point)
    if member is None:
        return math.nan
    if member.state in (FAILED, LOST):
        return FAILING
    values = [value for at, value in member.reports.items() if at > epoch - _ROUNDING]
    if not values and member.state in (RUNNING, WAITING):
        return math.nan
    value = values[0] if values else table.value(member)
    return FAILING if math.isnan(value) else _signed(table, value)


def finalists(many: Many, table: Table) -> list[Configuration]:
    """Return the best configurations, and the default one if it was tried: those to train with more seeds.

    A good configuration's metric varies more between seeds than it differs from those of other good configurations. So
    the best of many single runs is usually the luckiest. If each has several seeds or folds anyway, none races.
    """
    if many.config.num_confirmed == 0 or many.job.train.is_several:
        return []
    done = [each.point for each in ranked(table) if each.state == DONE and not is_racing(many, each.point)]
    best, number = [point.configuration for point in done], many.config.num_confirmed
    return [*best[:number], *(each for each in best[number:] if each == many.space.default)]
