"""What a job of many runs trains next, and which of its members are better, as functions of its table.

So a resumed job does only what is missing. Seeds and folds are trained all at once. A search is successive halving
(https://arxiv.org/abs/1502.07943): at each rung, the better half of the configurations continues. Then the best race
(https://doi.org/10.1023/A:1006556606079): each is trained with more seeds. After each seed, configurations that are
worse by more than chance drop out.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mnist_ray.many.points import Configuration, Point
from mnist_ray.many.table import Many, Member, Table
from mnist_ray.report.run_files import DONE, FAILED, LOST, RUNNING, WAITING
from mnist_ray.text import count

FAILING = -math.inf  # the score of a member that has failed
_ROUNDING = 1e-6  # of the epochs in members.csv
_RUNGS = (1 / 8, 1 / 4, 1 / 2, 1.0)  # fractions of all epochs
_MAX_SEEDS = 3  # per configuration, including that of the search
# Student's t at 90 %, one-sided, for 1, 2, … degrees of freedom; the last one also for more.
_T_90 = (3.08, 1.89, 1.64, 1.53, 1.48, 1.44, 1.41, 1.40, 1.38, 1.37)


@dataclass(frozen=True)
class Segment:
    """A part of a member's training: from its last checkpoint to an epoch, not always a whole number."""

    point: Point
    until_epoch: float
    is_tested: bool = False  # at its end


def rungs_of(many: Many) -> list[float]:
    """Return the epochs at which a search compares its configurations; the last one is the end of the training."""
    num_epochs = many.job.train.num_epochs
    return [part * num_epochs for part in _RUNGS] if many.config.scheduler == "halving" else [num_epochs]


def climb(many: Many, table: Table) -> list[list[Configuration]]:
    """Return the configurations on each rung that has begun; it begins when all have reached the previous one."""
    rungs = [many.configurations]
    num_trials, num_confirmed = len(many.configurations), many.config.num_confirmed
    for number, epoch in enumerate(rungs_of(many)[:-1], 1):
        scores = {each: score_at(table, many.points(each), epoch) for each in rungs[-1]}
        if not scores or any(map(math.isnan, scores.values())):
            break
        num_continuing = min(max(math.ceil(num_trials / 2**number), num_confirmed), len(scores))  # without ties
        least = sorted(scores.values(), reverse=True)[num_continuing - 1]
        default = many.space.default
        rungs.append([c for c, score in scores.items() if score > FAILING and (score >= least or c == default)])
    return rungs


def segments(many: Many, table: Table) -> list[Segment]:
    """Return what can be trained now, or is being trained."""
    if not many.is_sweep:
        done = [point for point, member in table.by_point.items() if member.state == DONE]
        left = [point for point in many.points(()) if point not in done]
        return [Segment(point, many.job.train.num_epochs, is_tested=True) for point in left]
    rungs, epochs = climb(many, table), rungs_of(many)
    last, epoch = rungs[-1], epochs[len(rungs) - 1]
    missing = _unreached(table, [point for each in last for point in many.points(each)], epoch)
    if len(rungs) == len(epochs) and not missing:
        missing = race(many, table, finalists(many, table), epoch)
    return [Segment(point, epoch) for point in missing]


def _unreached(table: Table, points: Sequence[Point], epoch: float) -> list[Point]:
    """Return the points whose members have not reached an epoch yet."""
    return [point for point in points if math.isnan(score_at(table, [point], epoch))]


def race(many: Many, table: Table, racing: Sequence[Configuration], epoch: float) -> list[Point]:
    """Return the points that the race needs next, trained to ``epoch``; none if it is over.

    ``racing`` are the configurations that begin it, with the seed of the search.
    """
    for num_seeds in range(2, _MAX_SEEDS + 1):
        if len(racing) < 2:
            break
        seeds = range(many.job.train.seed, many.job.train.seed + num_seeds)
        first = {each: many.points(each)[0] for each in racing}
        seeded = {each: [dataclasses.replace(first[each], seed=seed) for seed in seeds] for each in racing}
        if missing := _unreached(table, [point for points in seeded.values() for point in points], epoch):
            return missing
        scores = {each: [score_at(table, [point], epoch) for point in points] for each, points in seeded.items()}
        racing = still_racing(many, scores)
    return []


def still_racing(many: Many, scores: Mapping[Configuration, Sequence[float]]) -> list[Configuration]:
    """Return the configurations whose means over the seeds are not below the best one's by more than chance.

    Empty if the means differ by less than the standard error of a fraction of the validation examples: more seeds would
    not show which one is better on other data. Configurations that have failed are left out.

    The seeds are the blocks of a randomized block design: the residuals after configurations and seeds estimate the
    variance (Montgomery, Design and Analysis of Experiments, chapter 4).
    """
    complete = {each: of_seeds for each, of_seeds in scores.items() if FAILING not in of_seeds}
    if len(complete) < 2:
        return []
    measured = np.array(list(complete.values()))
    (number, num_seeds), means = measured.shape, measured.mean(axis=1)
    unexplained = measured - means[:, None] - measured.mean(axis=0) + measured.mean()
    freedom = (number - 1) * (num_seeds - 1)
    standard_error = math.sqrt(2 * float((unexplained**2).sum()) / freedom / num_seeds)  # of two means' difference
    min_mean = means.max() - _T_90[min(freedom, len(_T_90)) - 1] * standard_error
    racing = [each for each, mean in zip(complete, means, strict=True) if mean >= min_mean]
    if many.job.workload.monitor.is_fraction and many.num_validation:
        differ = means.max() - means[means >= min_mean].min()
        if differ < error_of_fraction(abs(float(means.max())), many.num_validation):
            return []
    return racing


def error_of_fraction(fraction: float, number: int) -> float:
    """Return the standard error of a fraction of ``number`` examples."""
    return math.sqrt(max(0.0, fraction * (1 - fraction)) / number)


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
    failed = {member.point.configuration for member in table.members if member.state == FAILED}

    def rank(each: Averaged) -> tuple[bool, int, tuple[float, float]]:
        num_done = sum(member.state == DONE for member in each.members)
        return each.configuration not in failed, num_done, _worth(table, each.val_monitor, each.val_loss)

    configurations = dict.fromkeys(point.configuration for point in table.by_point)
    return max(filter(None, (averaged(table, each) for each in configurations)), key=rank, default=None)


def averaged(table: Table, configuration: Configuration) -> Averaged | None:
    """Return a configuration with the means over its members; None if none of them is validated."""
    members = [member for member in table.members if member.point.configuration == configuration]
    validated = [member for member in members if table.is_validated(member)]
    if not validated:
        return None
    done = [member for member in validated if member.state == DONE] or validated
    val_monitor = statistics.mean(map(table.value, done))
    return Averaged(tuple(done), val_monitor, statistics.mean(member.figures["val_loss"] for member in done))


def _worth(table: Table, monitor: float, loss: float = 0.0) -> tuple[float, float]:
    """Return a sort key that is larger for better values: the workload's monitor, then the loss."""
    return monitor if table.workload.monitor.mode == "max" else -monitor, -loss


def ranked(table: Table) -> list[Member]:
    """Return all members, best first; those that failed or were not validated come last."""
    validated = [member for member in table.members if table.is_validated(member)]
    validated.sort(key=lambda each: _worth(table, table.value(each), each.figures["val_loss"]), reverse=True)
    return [*validated, *(member for member in table.members if not table.is_validated(member))]


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
    return FAILING if math.isnan(value) else _worth(table, value)[0]


def finalists(many: Many, table: Table) -> list[Configuration]:
    """Return the best configurations, and the default one if it was tried: those to train with more seeds.

    A good configuration's metric varies more between seeds than it differs from those of other good configurations. So
    the best of many single runs is usually the luckiest. If each has several seeds or folds anyway, none races.
    """
    if many.config.num_confirmed == 0 or many.job.train.is_several:
        return []
    done = [member.point for member in ranked(table) if member.state == DONE]
    best = [point.configuration for point in done if point.seed == many.job.train.seed]  # the race adds later seeds
    number = many.config.num_confirmed
    return [*best[:number], *(each for each in best[number:] if each == many.space.default)]
