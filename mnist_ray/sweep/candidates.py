"""The configurations that a sweep tries: all known at the start, or proposed by Optuna one by one."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from mnist_ray.settings import Choice
from mnist_ray.sweep.space import Point, Space, propose
from mnist_ray.sweep.trials import Sweep, TrialTable


class Candidates:
    """The points of a sweep's search, in the order in which they were proposed."""

    def __init__(self, sweep: Sweep, table: TrialTable) -> None:
        self._space, self._seed, self.num_unknown = sweep.space, sweep.job.train.seed, 0  # points still to be proposed
        if sweep.config.search == "optuna":
            known = [point for point in table.by_point if point.seed == self._seed]  # of an interrupted sweep
            self.points = known or sweep.space.default_points(self._seed)
            self.num_unknown = sweep.config.num_trials - len(self.points)
        else:
            self.points = propose(sweep.space, sweep.config, self._seed)

    def propose(self, score: Callable[[Point], float]) -> Point | None:
        """Return a new point, which is now also in ``points``; None if there are no more.

        Optuna's TPE learns the score of each point on the first rung; NaN if the point is not there yet. The later
        rungs cannot teach it anything: they begin when all points are proposed.
        """
        while self.num_unknown > 0:
            scores = {point: score(point) for point in self.points}
            known = {point: reached for point, reached in scores.items() if not math.isnan(reached)}
            point = self._space.point(_suggested(self._space, known, self._seed + self.num_unknown), self._seed)
            self.num_unknown -= 1
            if point not in self.points:
                self.points.append(point)
                return point
        return None


def _suggested(space: Space, scores: dict[Point, float], seed: int) -> dict[str, Any]:
    """Return the values that Optuna suggests after trials with these scores."""
    import optuna  # an extra

    def distribution(name: str) -> Any:
        some = space.spaces[name]
        if isinstance(some, Choice):
            return optuna.distributions.CategoricalDistribution(some.options)
        is_whole = space.types[name] is int
        kind = optuna.distributions.IntDistribution if is_whole else optuna.distributions.FloatDistribution
        return kind(some.low, some.high, log=some.log)

    logging.getLogger("optuna").setLevel(logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), direction="maximize")
    spaces = {name: distribution(name) for name in space.spaces}
    for point, score in scores.items():
        study.add_trial(optuna.trial.create_trial(params=point.values, distributions=spaces, value=score))
    return study.ask(spaces).params
