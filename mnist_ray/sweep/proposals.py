"""The points that a sweep tries: random ones, a grid, or those that Optuna suggests."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from mnist_ray.config import SweepConfig
from mnist_ray.errors import UsageError
from mnist_ray.settings import Choice, Range, SearchSpace
from mnist_ray.sweep.space import Point, Space
from mnist_ray.sweep.trials import Sweep, TrialTable

_DRAWS = 10  # per trial, as some may be equal


class Candidates:
    """The points of a sweep's search, in the order in which they were proposed."""

    def __init__(self, sweep: Sweep, table: TrialTable) -> None:
        self._space, self._seed, self.num_unknown = sweep.space, sweep.job.train.seed, 0  # points still to be proposed
        if sweep.config.search_algorithm == "optuna":
            known = [point for point in table.by_point if point.seed == self._seed]  # of an interrupted sweep
            self.points = known or sweep.space.default_points(self._seed)
            self.num_unknown = sweep.config.num_trials - len(self.points)
        else:
            self.points = propose(sweep.space, sweep.config, self._seed)

    def propose(self, score: Callable[[Point], float]) -> Point | None:
        """Add a new point to ``points``, and return it; None if there are no more.

        Optuna's TPE learns each point's score on the first rung; the score is NaN until the point has reached it. Later
        rungs come too late for TPE: they begin when all points are proposed.
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
        axis = space.spaces[name]
        if isinstance(axis, Choice):
            return optuna.distributions.CategoricalDistribution(axis.options)
        is_whole = space.types[name] is int
        kind = optuna.distributions.IntDistribution if is_whole else optuna.distributions.FloatDistribution
        return kind(axis.low, axis.high, log=axis.log)

    logging.getLogger("optuna").setLevel(logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), direction="maximize")
    spaces = {name: distribution(name) for name in space.spaces}
    for point, score in scores.items():
        study.add_trial(optuna.trial.create_trial(params=point.values, distributions=spaces, value=score))
    return study.ask(spaces).params


def propose(space: Space, sweep: SweepConfig, seed: int) -> list[Point]:
    """Return all points of a random or grid search, each once. They depend only on the settings and the seed.

    Raises UsageError if a grid has more combinations than trials.
    """
    if sweep.search_algorithm == "grid":
        return _grid(space, sweep.num_trials, seed)
    rng = np.random.default_rng(seed)
    drawn = [
        space.point({name: _draw(axis, rng, space.types[name]) for name, axis in space.spaces.items()}, seed)
        for _ in range(_DRAWS * sweep.num_trials)
    ]
    return list(dict.fromkeys(space.default_points(seed) + drawn))[: sweep.num_trials]


def _draw(space: SearchSpace, rng: np.random.Generator, kind: type) -> Any:
    if isinstance(space, Choice):
        return space.options[int(rng.integers(len(space.options)))]
    low, high = space.low, space.high + (kind is int)  # a whole number stands for what begins with it
    value = math.exp(rng.uniform(math.log(low), math.log(high))) if space.log else rng.uniform(low, high)
    return min(int(value), int(space.high)) if kind is int else _rounded(value, kind, space)


def _rounded(value: float, kind: type, space: Range) -> Any:
    """Return a value with four digits of those in which the range's ends differ; a whole number, if ``kind`` is int."""
    if kind is int or space.low == space.high:
        return round(value) if kind is int else space.low
    num_equal = int(math.log10(max(abs(space.low), abs(space.high)) / (space.high - space.low)))
    return min(max(float(f"{value:.{4 + num_equal}g}"), space.low), space.high)


def _grid(space: Space, num_trials: int, seed: int) -> list[Point]:
    choices = {name: axis.options for name, axis in space.spaces.items() if isinstance(axis, Choice)}
    ranges = {name: axis for name, axis in space.spaces.items() if isinstance(axis, Range)}
    num_choices = math.prod(map(len, choices.values()))
    if (needed := num_choices * 2 ** sum(axis.low < axis.high for axis in ranges.values())) > num_trials:
        ends = f", with both ends of {', '.join(ranges)}" if ranges else ""
        raise UsageError(
            f"--search-algorithm grid needs {needed} trials for all combinations of {', '.join(space.spaces)}{ends}"
        )
    num_values = int((num_trials / num_choices) ** (1 / len(ranges)) + 1e-9) if ranges else 1
    values: dict[str, Collection[Any]] = {}
    for name, axis in ranges.items():
        spaced = (np.geomspace if axis.log else np.linspace)(axis.low, axis.high, num_values)
        values[name] = [_rounded(float(value), space.types[name], axis) for value in spaced]
    values |= choices
    combinations = itertools.product(*values.values())
    points = (space.point(dict(zip(values, combination, strict=True)), seed) for combination in combinations)
    return list(dict.fromkeys(points))
