"""The points of a job of many runs: values of searched settings, a seed and a fold; and the space that is searched.

A sweep tries random configurations of the space, or a grid of all its combinations.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mnist_ray import settings
from mnist_ray.config import SweepConfig, TrainConfig, shown
from mnist_ray.errors import UsageError
from mnist_ray.settings import Choice, Range, SearchSpace, Setting, parse_text
from mnist_ray.text import did_you_mean
from mnist_ray.workload.base import Workload

_NONE, _LOG = "none", "log:"
_MAX_NAME_BYTES = 180  # bytes of a trial folder's name; file systems allow 255
_DRAWS = 10  # per trial, as some may be equal

Configuration = tuple[tuple[str, Any], ...]  # (setting, value) pairs of the searched settings


@dataclass(frozen=True)
class Point:
    """What distinguishes one run of many."""

    configuration: Configuration  # the same for all seeds and folds; empty if nothing is searched
    seed: int
    fold: int | None = None  # counted from 1

    @property
    def values(self) -> dict[str, Any]:
        """The searched settings' values."""
        return dict(self.configuration)

    @property
    def label(self) -> str:
        """What messages call the run among those of its configuration."""
        return f"seed {self.seed}" + (f", fold {self.fold}" if self.fold else "")

    @property
    def name(self) -> str:
        """The run's folder: unique to the point, if the file system distinguishes upper and lower case."""
        end = f"seed-{self.seed}" + (f"_fold-{self.fold}" if self.fold else "")
        name = "_".join([*(f"{name}-{value}" for name, value in self.configuration), end])
        texts = [value for _, value in self.configuration if isinstance(value, str)]
        is_unique = all(re.fullmatch(r"\w+", text) and text != "None" for text in texts)
        if is_unique and len(name.encode()) <= _MAX_NAME_BYTES:
            return name
        return f"trial-{hashlib.sha256(repr(self.configuration).encode()).hexdigest()[:16]}_{end}"


@dataclass(frozen=True)
class Space:
    """The searched settings, in the order of display."""

    spaces: Mapping[str, SearchSpace]
    types: Mapping[str, type]
    defaults: Mapping[str, Any]

    def configuration(self, values: Mapping[str, Any]) -> Configuration:
        """Return a configuration of these values, which may be numbers from NumPy, or text from a file."""
        return tuple((name, _as(self.types[name], values[name], space)) for name, space in self.spaces.items())

    @property
    def default(self) -> Configuration | None:
        """The default configuration, which others must beat; None if it is outside the space."""
        is_inside = all(_contains(space, self.defaults[name]) for name, space in self.spaces.items())
        return self.configuration(self.defaults) if is_inside else None

    def up_to(self, maximum: int, name: str) -> Space:
        """Return the space with the values and the default of a searched setting limited to ``maximum``."""
        space = self.spaces[name]
        if isinstance(space, Choice):
            limited: SearchSpace = Choice(tuple(dict.fromkeys(min(option, maximum) for option in space.options)))
        else:
            limited = Range(min(space.low, maximum), min(space.high, maximum), space.log)
        defaults = {**self.defaults, name: min(self.defaults[name], maximum)}
        return Space({**self.spaces, name: limited}, self.types, defaults)

    def texts(self) -> tuple[str, ...]:
        """Return the space in the syntax of ``--sweep``."""
        texts = []
        for name, space in self.spaces.items():
            if isinstance(space, Choice):
                values = options_text(space.options)
            else:
                low, high = map(self.types[name], (space.low, space.high))
                values = f"{_LOG * space.log}{low}:{high}"
            texts.append(f"{name}={values}")
        return tuple(texts)


def options_text(options: object) -> str:
    """Return one or several options in the syntax of ``--sweep``; a text is in this syntax already.

    It is that of a line of CSV, with quotes around options with commas.
    """
    if isinstance(options, str):
        return options
    options = options if isinstance(options, Iterable) else [options]
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([_NONE if option is None else option for option in options])
    return text.getvalue()


def _as(kind: type, value: Any, space: SearchSpace) -> Any:
    """Convert a value to its setting's type. None, which is empty text in a file, stays None."""
    may_be_none = kind is not str or (isinstance(space, Choice) and None in space.options)
    if value is None or (value == "" and may_be_none):
        return None
    return parse_text(kind, value) if isinstance(value, str) else kind(value)


def _contains(space: SearchSpace, value: Any) -> bool:
    if isinstance(space, Choice):
        return value in space.options
    return value is not None and bool(space.low <= value <= space.high)


def space_of(workload_class: type[Workload], values: Mapping[str, Any], fixed: Collection[str] = ()) -> Space:
    """Return the space in ``values["sweep"]``; by default, all settings with a search space except ``fixed``.

    The default configuration has the ``values`` of a recipe or a file, and otherwise the workload's defaults. Raises
    UsageError if there is nothing to search, or a text is not a valid space.
    """
    known = settings.declared(TrainConfig, workload_class.Settings)
    spaces: dict[str, SearchSpace] = {}
    for text in values.get("sweep") or ():
        with _prefixed(f"--sweep {text:.100}"):
            name, space = _parsed(text, known)
        if name in spaces or name in fixed:
            raise UsageError(f"--sweep searches {name}: name it only once, and without {shown(name)}")
        spaces[name] = space
    if not values.get("sweep"):
        own = {name: workload_class.search.get(name, setting.search) for name, setting in known.items()}
        spaces = {name: space for name, space in own.items() if space and name not in fixed}
        for name, space in spaces.items():
            with _prefixed(f"the search space of {name}"):
                _check(known[name], space)
    if not spaces:
        raise UsageError(f"nothing to search: name settings of {workload_class.__name__} with --sweep NAME=A,B,C")
    defaults = {**workload_class().defaults, **values}
    return Space(spaces, {name: known[name].plain for name in spaces}, {name: defaults[name] for name in spaces})


@contextlib.contextmanager
def _prefixed(place: str) -> Iterator[None]:
    """Name the place of a mistake in its message."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from error


def _parsed(text: str, known: Mapping[str, Setting]) -> tuple[str, SearchSpace]:
    """Parse and check a text of ``--sweep``; return a setting's name and its space. Raises UsageError."""
    name, _, values = (part.strip() for part in text.partition("="))
    name = name.replace("-", "_")
    if not name or not values:
        raise UsageError("write NAME=A,B,C, NAME=LOW:HIGH or NAME=log:LOW:HIGH")
    if name not in known:
        raise UsageError(f"there is no setting {name}{did_you_mean(name, known)}")
    setting = known[name]
    is_range = ":" in values and setting.plain in (int, float)
    space = _parsed_range(setting, values) if is_range else _parsed_options(setting, values)
    _check(setting, space)
    return name, space


def _parsed_range(setting: Setting, text: str) -> Range:
    ends = [_value_of(setting, end) for end in text.removeprefix(_LOG).split(":")]
    if len(ends) != 2 or None in ends:
        raise UsageError("a range is LOW:HIGH or log:LOW:HIGH")
    return Range(ends[0], ends[1], log=text.startswith(_LOG))


def _parsed_options(setting: Setting, text: str) -> Choice:
    try:
        (texts,) = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    except (ValueError, csv.Error) as error:
        raise UsageError("write A,B,C, with double quotes around a value that contains a comma") from error
    options = tuple(_value_of(setting, text) for text in texts)
    if len(set(options)) < len(options):
        raise UsageError("values must differ")
    return Choice(options)


def _value_of(setting: Setting, text: str) -> Any:
    """Parse and check a value. Raises UsageError."""
    if text == _NONE and setting.may_be_none:
        return None
    try:
        value = parse_text(setting.plain, text.strip())
    except ValueError as error:
        raise UsageError(f"{text!r} is not of type {setting.plain.__name__}") from error
    return setting.checked(value)


def _check(setting: Setting, space: SearchSpace) -> None:
    """Raise UsageError if a setting cannot be searched, or rejects a value of the space."""
    if not (setting.is_searchable and setting.decides_weights) or setting.plain is tuple:
        raise UsageError(f"{setting.name} cannot be searched: all trials share it")
    if not isinstance(space, SearchSpace):
        raise UsageError(f"{space!r:.40} is neither a Choice nor a Range")
    if isinstance(space, Range) and (space.low > space.high or (space.log and space.low <= 0)):
        raise UsageError("a range is LOW:HIGH or log:LOW:HIGH, the latter of positive numbers")
    for value in space.options if isinstance(space, Choice) else map(setting.plain, (space.low, space.high)):
        setting.checked(value)


def propose(space: Space, sweep: SweepConfig, seed: int) -> list[Configuration]:
    """Return all configurations of a random or grid search, each once; only the settings and the seed decide.

    Raises UsageError if a grid has a range, or more combinations than trials.
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
    return min(int(value), int(space.high)) if kind is int else _rounded(value, space)


def _rounded(value: float, space: Range) -> float:
    """Return a value with four digits of those in which the range's ends differ."""
    if space.low == space.high:
        return space.low
    num_equal = int(math.log10(max(abs(space.low), abs(space.high)) / (space.high - space.low)))
    return min(max(float(f"{value:.{4 + num_equal}g}"), space.low), space.high)


def _grid(space: Space, num_trials: int) -> list[Configuration]:
    options = {name: axis.options for name, axis in space.spaces.items() if isinstance(axis, Choice)}
    if ranges := [name for name in space.spaces if name not in options]:
        raise UsageError(f"--search-algorithm grid needs values, not a range: --sweep {ranges[0]}=A,B,C")
    needed = math.prod(map(len, options.values()))
    if needed > num_trials:
        raise UsageError(f"--search-algorithm grid needs --num-trials {needed} for all combinations")
    combinations = itertools.product(*options.values())
    return [space.configuration(dict(zip(options, values, strict=True))) for values in combinations]
