"""The configurations that a sweep tries: random ones or a grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from typing import Any

import numpy as np

from mnist_ray.config import SweepConfig
from mnist_ray.errors import UsageError
from mnist_ray.many.points import Configuration, Space
from mnist_ray.settings import Choice, Range, SearchSpace

_DRAWS = 10  # per trial, as some may be equal


def propose(space: Space, sweep: SweepConfig, seed: int) -> list[Configuration]:
    """Return all configurations of a random or grid search, each once; only the settings and the seed decide.

    Raises UsageError if a grid has more combinations than trials.
    """
    if sweep.search_algorithm == "grid":
        return _grid(space, sweep.num_trials)
    rng = np.random.default_rng(seed)
    drawn = [
        space.configuration({name: _draw(axis, rng, space.types[name]) for name, axis in space.spaces.items()})
        for _ in range(_DRAWS * sweep.num_trials)
    ]
    default = [] if space.default is None else [space.default]
    return list(dict.fromkeys(default + drawn))[: sweep.num_trials]


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


def _grid(space: Space, num_trials: int) -> list[Configuration]:
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
    found = (space.configuration(dict(zip(values, combination, strict=True))) for combination in combinations)
    return list(dict.fromkeys(found))
