"""What a sweep trains next, as functions of its table, so that a resumed sweep does only what is missing.

The search is successive halving (https://arxiv.org/abs/1502.07943): at each rung, the better half of the trials
continues. Then the best configurations race.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mnist_ray.sweep.proposals import Candidates
from mnist_ray.sweep.race import race
from mnist_ray.sweep.ranking import FAILING, finalists, score_at, unreached
from mnist_ray.sweep.space import Point
from mnist_ray.sweep.trials import Sweep, TrialTable

_RUNGS = (1 / 8, 1 / 4, 1 / 2, 1.0)  # fractions of all epochs


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
