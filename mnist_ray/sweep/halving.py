"""What a sweep trains next, as functions of its table, so that a resumed sweep does only what is missing.

The search is successive halving (https://arxiv.org/abs/1502.07943): at each rung, the better half of the trials
continues. Then the best configurations race (https://doi.org/10.1023/A:1006556606079): each is trained with more seeds.
After each seed, configurations that are worse by more than chance drop out.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mnist_ray.sweep.proposals import Candidates
from mnist_ray.sweep.ranking import FAILING, finalists, score_at, unreached
from mnist_ray.sweep.space import Point
from mnist_ray.sweep.trials import Sweep, TrialTable

_RUNGS = (1 / 8, 1 / 4, 1 / 2, 1.0)  # fractions of all epochs
_MAX_SEEDS = 3  # per configuration, including that of the search
# Student's t at 90 %, one-sided, for 1, 2, … degrees of freedom; the last one also for more.
_T_90 = (3.08, 1.89, 1.64, 1.53, 1.48, 1.44, 1.41, 1.40, 1.38, 1.37)


@dataclass(frozen=True)
class Segment:
    """A part of a trial: from its last checkpoint to an epoch, not always a whole number."""

    point: Point
    until_epoch: float


def rungs_of(sweep: Sweep) -> list[float]:
    """Return the epochs at which a sweep compares its trials; the last one is the end of the training."""
    num_epochs = sweep.job.train.num_epochs
    return [part * num_epochs for part in _RUNGS] if sweep.config.scheduler == "halving" else [num_epochs]


def climb(sweep: Sweep, table: TrialTable, candidates: Candidates) -> list[list[Point]]:
    """Return the trials on each rung that has begun; a rung begins when all trials have reached the previous one."""
    rungs, default = [candidates.points], sweep.space.default_points(sweep.job.train.seed)
    num_trials, num_confirmed = len(candidates.points), sweep.config.num_confirmed
    for number, epoch in enumerate(rungs_of(sweep)[:-1], 1):
        scores = {point: score_at(table, point, epoch) for point in rungs[-1]}
        if not scores or candidates.num_unknown or any(map(math.isnan, scores.values())):
            break
        num_continuing = min(max(math.ceil(num_trials / 2**number), num_confirmed), len(scores))  # without ties
        min_score = sorted(scores.values(), reverse=True)[num_continuing - 1]
        rungs.append([p for p, score in scores.items() if score > FAILING and (score >= min_score or p in default)])
    return rungs


def segments(sweep: Sweep, table: TrialTable, candidates: Candidates) -> list[Segment]:
    """Return what can be trained now, or is being trained."""
    rungs, epochs = climb(sweep, table, candidates), rungs_of(sweep)
    last, epoch = rungs[-1], epochs[len(rungs) - 1]
    missing = unreached(table, last, epoch)
    if len(rungs) == len(epochs) and not candidates.num_unknown:
        # Before all trials have reached the end, the finalists are known only if no trial has to drop out.
        in_time = last if len(last) <= sweep.config.num_confirmed else []
        racing = in_time if missing else finalists(table, sweep.config.num_confirmed, sweep.job.train.seed)
        missing = race(sweep, table, racing, epoch) or missing
    return [Segment(point, epoch) for point in missing]


def race(sweep: Sweep, table: TrialTable, racing: Sequence[Point], epoch: float) -> list[Point]:
    """Return the trials that the race needs next, trained to ``epoch``; none if it is over.

    ``racing`` are the configurations that begin it, with the seed of the search.
    """
    for num_seeds in range(2, _MAX_SEEDS + 1):
        if len(racing) < 2:
            break
        seeded = {p: [dataclasses.replace(p, seed=p.seed + more) for more in range(num_seeds)] for p in racing}
        if missing := unreached(table, itertools.chain(*seeded.values()), epoch):
            return missing
        scores = {point: [score_at(table, trial, epoch) for trial in trials] for point, trials in seeded.items()}
        racing = still_racing(sweep, scores)
    return []


def still_racing(sweep: Sweep, scores: Mapping[Point, Sequence[float]]) -> list[Point]:
    """Return the points whose means over the seeds are not below the best one's by more than chance.

    Empty if the means differ by less than the standard error of a fraction of the validation examples: more seeds would
    not show which one is better on other data. Points that have failed are left out.

    The seeds are the blocks of a randomized block design: the residuals after points and seeds estimate the variance
    (Montgomery, Design and Analysis of Experiments, chapter 4).
    """
    complete = {point: of_seeds for point, of_seeds in scores.items() if FAILING not in of_seeds}
    if len(complete) < 2:
        return []
    measured = np.array(list(complete.values()))
    (num_points, num_seeds), means = measured.shape, measured.mean(axis=1)
    unexplained = measured - means[:, None] - measured.mean(axis=0) + measured.mean()
    freedom = (num_points - 1) * (num_seeds - 1)
    standard_error = math.sqrt(2 * float((unexplained**2).sum()) / freedom / num_seeds)  # of two means' difference
    min_mean = means.max() - _T_90[min(freedom, len(_T_90)) - 1] * standard_error
    racing = [point for point, mean in zip(complete, means, strict=True) if mean >= min_mean]
    if sweep.job.workload.monitor.is_fraction and sweep.num_validation:
        differ = means.max() - means[means >= min_mean].min()
        if differ < error_of_fraction(abs(float(means.max())), sweep.num_validation):
            return []
    return racing


def error_of_fraction(fraction: float, number: int) -> float:
    """Return the standard error of a fraction of ``number`` examples."""
    return math.sqrt(max(0.0, fraction * (1 - fraction)) / number)
