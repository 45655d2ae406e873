"""The configurations that a sweep tries: all known at the start, or proposed by Optuna one by one."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from mnist_ray.settings import Choice
from mnist_ray.sweep.space import Point, propose
from mnist_ray.sweep.trials import Sweep, TrialTable


class Candidates:
    """The points of a random or grid search."""

    def __init__(self, sweep: Sweep) -> None:
        self.points = propose(sweep.space, sweep.config, sweep.job.train.seed)
        self.num_unknown = 0  # points that are still to be proposed

    def propose(self, score: Callable[[Point], float]) -> Point | None:
        """Return a new point, which is now also in ``points``; None if there are no more."""
        return None


class OptunaCandidates(Candidates):
    """Points that Optuna's TPE proposes; it learns what each has reached on the first rung.

    The later rungs cannot teach it anything: they begin when all points are proposed.
    """

    def __init__(self, sweep: Sweep, table: TrialTable) -> None:
        import optuna  # an extra

        logging.getLogger("optuna").setLevel(logging.WARNING)
        self._space, self._seed = sweep.space, sweep.job.train.seed
        known = [point for point in table.by_point if point.seed == self._seed]
        # A resumed search must not propose the same points again.
        sampler = optuna.samplers.TPESampler(seed=self._seed + len(known))
        self._study = optuna.create_study(sampler=sampler, direction="maximize")
        self._trials = dict[Point, Any]()  # Optuna's, until their results are known
        self.points, self.num_unknown = list[Point](), sweep.config.num_trials
        for point in known or sweep.space.default_points(self._seed):
            self._study.enqueue_trial(point.values)
            self._ask()

    def propose(self, score: Callable[[Point], float]) -> Point | None:
        """Tell Optuna the new results, and let it propose a point."""
        for point, reached in {point: score(point) for point in self._trials}.items():
            if not math.isnan(reached):
                self._study.tell(self._trials.pop(point), reached)
        proposed = None
        while proposed is None and self.num_unknown > 0:
            proposed = self._ask()
        return proposed

    def _ask(self) -> Point | None:
        """Return the next point; None if Optuna has proposed it before."""
        trial, spaces = self._study.ask(), self._space.spaces
        point = self._space.point({name: self._suggested(trial, name) for name in spaces}, self._seed)
        self.num_unknown -= 1
        if point in self.points:
            return None
        self.points.append(point)
        self._trials[point] = trial
        return point

    def _suggested(self, trial: Any, name: str) -> Any:
        some = self._space.spaces[name]
        if isinstance(some, Choice):
            return trial.suggest_categorical(name, some.options)
        suggest = trial.suggest_int if self._space.types[name] is int else trial.suggest_float
        return suggest(name, some.low, some.high, log=some.log)
