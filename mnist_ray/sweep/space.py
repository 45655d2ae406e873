"""What a sweep searches: any settings of the training or the workload, over values or ranges."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import numpy as np

from mnist_ray import settings
from mnist_ray.config import SweepConfig, TrainConfig
from mnist_ray.errors import UsageError, did_you_mean, in_words
from mnist_ray.settings import Choice, Range, SearchSpace, parse_text, value_type
from mnist_ray.workload.base import Workload

_NONE = "none"
_OF_ALL_TRIALS = ("seed", "validation_size", "limit", "overfit_batches", "callback")
"""What --sweep does not take: the data are the same for all trials, and each configuration has its seeds."""
_LONGEST_NAME = 180  # of a trial's folder; file systems take 255 bytes


@dataclass(frozen=True)
class Point:
    """What one trial tries: values of the settings that are searched, and the seed to train it with."""

    configuration: tuple[tuple[str, Any], ...]  # what is the same for all seeds: (setting, value) pairs
    seed: int

    @property
    def values(self) -> dict[str, Any]:
        """The settings' values, without the seed."""
        return dict(self.configuration)

    @property
    def name(self) -> str:
        """The trial's folder."""
        parts = [f"{name}-{value}".replace("/", "_") for name, value in (*self.configuration, ("seed", self.seed))]
        name = "_".join(parts)
        if len(name.encode()) <= _LONGEST_NAME:
            return name
        return f"trial-{hashlib.sha256(name.encode()).hexdigest()[:16]}_seed-{self.seed}"


@dataclass(frozen=True)
class Space:
    """The settings that are searched, in the order in which they are shown."""

    spaces: Mapping[str, SearchSpace]
    types: Mapping[str, type]
    defaults: Mapping[str, Any]  # what holds where nobody says anything else

    def point(self, values: Mapping[str, Any], seed: int) -> Point:
        """Return the point of some values, which may be others' numbers (NumPy's, Optuna's, text of a file)."""
        return Point(tuple((name, _as(self.types[name], values[name])) for name in self.spaces), seed)

    def default_points(self, seed: int) -> list[Point]:
        """Return the default configuration where the space holds it: what the others have to beat."""
        inside = all(_contains(space, self.defaults[name]) for name, space in self.spaces.items())
        return [self.point(self.defaults, seed)] if inside else []

    def largest(self, name: str, otherwise: int) -> int:
        """Return the largest value that it has of a number, or the one that holds where it does not search it."""
        space = self.spaces.get(name)
        if space is None:
            return otherwise
        return max(space.options) if isinstance(space, Choice) else int(space.high)

    def describe(self) -> str:
        """Return the space as people read it."""
        parts = []
        for name, space in self.spaces.items():
            if isinstance(space, Choice):
                parts.append(f"{in_words(name)} from {', '.join(map(str, space.options))}")
            elif space.low == space.high:
                parts.append(f"{in_words(name)} {space.low:g}")
            else:
                parts.append(f"{in_words(name)} {space.low:g} to {space.high:g}")
        return "; ".join(parts)


def _as(kind: type, value: Any) -> Any:
    """Return a value as its setting has it; None, and the nothing that a file has in its place, stay None."""
    if value is None or (value == "" and kind is not str):
        return None
    return parse_text(kind, value) if isinstance(value, str) else kind(value)


def _contains(space: SearchSpace, value: Any) -> bool:
    if isinstance(space, Choice):
        return value in space.options
    return value is not None and bool(space.low <= value <= space.high)


def space_of(workload_class: type[Workload], values: Mapping[str, Any], fixed: Collection[str] = ()) -> Space:
    """Return what ``values["sweep"]`` says is searched; without it, all that has a search space, but ``fixed``.

    Raises UsageError where there is nothing to search, or that is no space.
    """
    known = _fields_of(workload_class)
    if texts := values.get("sweep"):
        named = [_parsed(text, known) for text in texts]
        spaces = dict(named)
        twice = [name for name, _ in named if sum(name == other for other, _ in named) > 1]
        if both := [*twice, *(name for name in spaces if name in fixed)]:
            raise UsageError(f"--sweep searches {both[0]}: say once how, and leave out {settings.flag(both[0])}")
    else:
        of_class = {
            name: workload_class.search.get(name, some.field.metadata.get("search")) for name, some in known.items()
        }
        spaces = {name: space for name, space in of_class.items() if space is not None and name not in fixed}
    if not spaces:
        raise UsageError(f"nothing to search: name settings of {workload_class.__name__} by --sweep NAME=A,B,C")
    defaults = workload_class().defaults
    return Space(spaces, {name: known[name].type for name in spaces}, {name: defaults[name] for name in spaces})


@dataclass(frozen=True)
class _Field:
    """A setting that may be searched."""

    config_class: type
    field: dataclasses.Field[Any]
    annotation: Any

    @property
    def type(self) -> type:
        return value_type(self.annotation)[0]


def _fields_of(workload_class: type[Workload]) -> dict[str, _Field]:
    return {
        field.name: _Field(config_class, field, hints[field.name])
        for config_class in (TrainConfig, workload_class.Settings)
        for hints in [get_type_hints(config_class)]
        for field in dataclasses.fields(config_class)
    }


def _parsed(text: str, known: Mapping[str, _Field]) -> tuple[str, SearchSpace]:
    """Return the setting and the space that a text of ``--sweep`` stands for. Raises UsageError."""
    name, _, given = (part.strip() for part in text.partition("="))
    name = name.replace("-", "_")
    if not name or not given:
        raise UsageError(f"--sweep {text}: write NAME=A,B,C, NAME=LOW:HIGH or NAME=log:LOW:HIGH")
    if name not in known:
        raise UsageError(f"--sweep {text}: there is no setting {name}{did_you_mean(name, known)}")
    some = known[name]
    if name in _OF_ALL_TRIALS or some.type is tuple:
        raise UsageError(f"--sweep {text}: {name} is the same for all trials")
    if ":" in given and some.type in (int, float):
        return name, _range_of(name, text, given, some)
    options = tuple(_value_of(name, text, option, some) for option in given.split(","))
    if len(set(options)) < len(options):
        raise UsageError(f"--sweep {text}: values must differ")
    return name, Choice(options)


def _range_of(name: str, text: str, given: str, some: _Field) -> Range:
    log, _, ends = given.rpartition("log:")
    low, high = (_value_of(name, text, end, some) for end in f"{ends}:".split(":")[:2])
    if ends.count(":") != 1 or log or low > high or (given != ends and low <= 0):
        raise UsageError(f"--sweep {text}: a range is LOW:HIGH or log:LOW:HIGH, the latter of positive numbers")
    return Range(low, high, log=given != ends)


def _value_of(name: str, text: str, value: str, some: _Field) -> Any:
    """Return the value of a setting that a text stands for, checked. Raises UsageError."""
    is_none = value == _NONE and type(None) in get_args(some.annotation)
    try:
        parsed = None if is_none else parse_text(some.type, value.strip())
    except ValueError as error:
        raise UsageError(f"--sweep {text}: {value!r} is no {some.type.__name__}") from error
    try:
        return getattr(settings.build(some.config_class, {name: parsed}), name)
    except UsageError as error:
        raise UsageError(f"--sweep {text}: {error}") from error


def texts_of(space: Space) -> tuple[str, ...]:
    """Return what ``--sweep`` takes for a space."""

    def text_of(some: SearchSpace) -> str:
        if isinstance(some, Range):
            return f"{'log:' * some.log}{some.low}:{some.high}"
        return ",".join(_NONE if option is None else str(option) for option in some.options)

    return tuple(f"{name}={text_of(some)}" for name, some in space.spaces.items())


def propose(space: Space, sweep: SweepConfig, seed: int) -> list[Point]:
    """Return the points of a random or grid search, all at once; the same for the same settings and seed.

    Raises UsageError where a grid has no trial for each choice.
    """
    if sweep.search == "grid":
        return _grid(space, sweep.num_trials, seed)
    rng = np.random.default_rng(seed)
    drawn = [
        space.point({name: _draw(some, rng, space.types[name]) for name, some in space.spaces.items()}, seed)
        for _ in range(sweep.num_trials)
    ]
    return (space.default_points(seed) + drawn)[: sweep.num_trials]


def _draw(space: SearchSpace, rng: np.random.Generator, kind: type) -> Any:
    if isinstance(space, Choice):
        return space.options[int(rng.integers(len(space.options)))]
    if space.log:
        return _rounded(math.exp(rng.uniform(math.log(space.low), math.log(space.high))), kind)
    return _rounded(rng.uniform(space.low, space.high), kind)


def _rounded(value: float, kind: type) -> Any:
    return round(value) if kind is int else float(f"{value:.4g}")


def _grid(space: Space, num_trials: int, seed: int) -> list[Point]:
    choices = {name: some.options for name, some in space.spaces.items() if isinstance(some, Choice)}
    ranges = {name: some for name, some in space.spaces.items() if isinstance(some, Range)}
    num_choices = math.prod(map(len, choices.values()))
    if num_choices > num_trials:
        raise UsageError(f"--search grid needs a trial for each of the {num_choices} choices of {', '.join(choices)}")
    num_values = int((num_trials / num_choices) ** (1 / len(ranges)) + 1e-9) if ranges else 1
    values = {name: _spaced(some, num_values, space.types[name]) for name, some in ranges.items()}
    names = [*values, *choices]
    combinations = itertools.product(*values.values(), *choices.values())
    return list(dict.fromkeys(space.point(dict(zip(names, some, strict=True)), seed) for some in combinations))


def _spaced(space: Range, number: int, kind: type) -> list[Any]:
    spaced = np.geomspace if space.log else np.linspace
    return [_rounded(float(value), kind) for value in spaced(space.low, space.high, number)]
