"""The race of a sweep's best configurations, which is decided by more seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mnist_ray.sweep.ranking import FAILING
from mnist_ray.sweep.space import Point
from mnist_ray.sweep.trials import Sweep

# Student's t at 90 %, one-sided, for 1, 2, … degrees of freedom; the last one also for more.
_T_90 = (3.08, 1.89, 1.64, 1.53, 1.48, 1.44, 1.41, 1.40, 1.38, 1.37)


def still_racing(sweep: Sweep, scores: Mapping[Point, Sequence[float]]) -> list[Point]:
    """Return the points whose means over the seeds are not below the best one's by more than chance.

    Empty if the means differ by less than the standard error of a fraction of the validation examples: more seeds would
    not tell which one is better on other data. Points that have failed are left out.

    The seeds are the blocks of a randomized block design: what neither points nor seeds explain estimates the variance
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
    least = means.max() - _T_90[min(freedom, len(_T_90)) - 1] * standard_error
    racing = [point for point, mean in zip(complete, means, strict=True) if mean >= least]
    if sweep.job.workload.monitor.is_fraction and sweep.num_validation:
        best = abs(float(means.max()))
        if means.max() - means[means >= least].min() < math.sqrt(max(0.0, best * (1 - best)) / sweep.num_validation):
            return []
    return racing
