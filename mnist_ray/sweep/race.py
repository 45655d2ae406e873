"""The race of a sweep's best configurations (https://doi.org/10.1023/A:1006556606079).

Each is trained with more seeds. After each seed, configurations that are worse by more than chance drop out.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mnist_ray.sweep.ranking import FAILING, score_at, unreached
from mnist_ray.sweep.space import Point
from mnist_ray.sweep.trials import Sweep, TrialTable

_MAX_SEEDS = 3  # per configuration, including that of the search
# Student's t at 90 %, one-sided, for 1, 2, … degrees of freedom; the last one also for more.
_T_90 = (3.08, 1.89, 1.64, 1.53, 1.48, 1.44, 1.41, 1.40, 1.38, 1.37)


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
