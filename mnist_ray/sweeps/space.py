"""What a sweep searches: any settings of the training or the workload that declare a search space."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import numpy as np

from mnist_ray import settings
from mnist_ray.config import SweepConfig, TrainConfig
from mnist_ray.errors import UsageError
from mnist_ray.settings import Choice, Range, SearchSpace, bound_names, flag, parse_text, setting, value_type
from mnist_ray.wording import spoken
from mnist_ray.workload.interface import Workload


@dataclass(frozen=True)
class Point:
    """What one trial tries: values of the settings that are searched, and the seed to train it with."""

    configuration: tuple[tuple[str, Any], ...]
    """What is the same for all seeds: (setting, value) pairs."""
    seed: int

    @property
    def values(self) -> dict[str, Any]:
        """The settings' values, without the seed."""
        return dict(self.configuration)

    @property
    def name(self) -> str:
        """The trial's folder."""
        parts = [f"{name}-{value}".replace("/", "_") for name, value in (*self.configuration, ("seed", self.seed))]
        return "_".join(parts)


@dataclass(frozen=True)
class Space:
    """The settings that are searched, in the order in which they are shown."""

    spaces: Mapping[str, SearchSpace]
    types: Mapping[str, type]
    defaults: Mapping[str, Any]
    """What holds where nobody says anything else."""

    def point(self, values: Mapping[str, Any], seed: int) -> Point:
        """Return the point of some values, which may be others' numbers (NumPy's, Optuna's, text of a file)."""
        return Point(tuple((name, _as(self.types[name], values[name])) for name in self.spaces), seed)

    def default_points(self, seed: int) -> list[Point]:
        """Return the default configuration where the space holds it: what the others have to beat."""
        inside = all(_contains(space, self.defaults[name]) for name, space in self.spaces.items())
        return [self.point(self.defaults, seed)] if inside else []

    def described(self) -> str:
        """Return the space as people read it."""
        parts = []
        for name, space in self.spaces.items():
            if isinstance(space, Choice):
                parts.append(f"{spoken(name)} from {', '.join(map(str, space.options))}")
            elif space.low == space.high:
                parts.append(f"{spoken(name)} {space.low:g}")
            else:
                parts.append(f"{spoken(name)} {space.low:g} to {space.high:g}")
        return "; ".join(parts)


def _as(kind: type, value: Any) -> Any:
    """Return a value as its setting has it; None, and the nothing that a file has in its place, stay None."""
    if value is None or (value == "" and kind is not str):
        return None
    return parse_text(kind, value) if isinstance(value, str) else kind(value)


def described(values: Mapping[str, Any]) -> str:
    """Return settings with their values as people read them."""
    return ", ".join(f"{spoken(name)} {shown(value)}" for name, value in values.items())


def shown(value: Any) -> str:
    """Return a setting's value as people read it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _contains(space: SearchSpace, value: Any) -> bool:
    return value in space.options if isinstance(space, Choice) else bool(space.low <= value <= space.high)


def searched(workload_class: type[Workload]) -> dict[str, tuple[SearchSpace, dataclasses.Field[Any], Any]]:
    """Return the search space, the field and the annotation of each setting that is searched."""
    found = {}
    for config_class in (TrainConfig, workload_class.Settings):
        hints = get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            space = workload_class.search.get(field.name, field.metadata.get("search"))
            if space is not None:
                found[field.name] = (space, field, hints[field.name])
    return found


def space_config(workload_class: type[Workload]) -> type:
    """Return a settings class that bounds the search: values to choose from as ``--batch-sizes``, ends as ``--X-min``.

    Its fields are made of the settings that are searched, and checked as these are.
    """
    fields: list[tuple[str, Any, Any]] = []
    for name, (space, field, annotation) in searched(workload_class).items():
        plain, _ = value_type(annotation)
        rule = {"check": field.metadata.get("check"), "must": field.metadata.get("must", "")}
        if isinstance(space, Choice):
            (bound,) = bound_names(name, space)
            fields.append((bound, tuple[plain, ...], _choices(space, name, **rule)))  # type: ignore[valid-type]
            continue
        ends = zip(bound_names(name, space), (space.low, space.high), ("smallest", "largest"), strict=True)
        for bound, default, which in ends:
            fields.append((bound, plain, setting(plain(default), f"{which} {spoken(name)}", **rule)))
    made = dataclasses.make_dataclass("SpaceConfig", fields, frozen=True, kw_only=True)
    made.__doc__ = "Where the sweep searches."
    return made


def _choices(space: Choice, name: str, check: Any, must: str) -> Any:
    def is_good(options: tuple[Any, ...]) -> bool:
        return len(options) == len(set(options)) > 0 and all(check is None or check(option) for option in options)

    rule = "must be different values" + (f", each of which {must}" if must else "")
    return setting(space.options, f"values of {spoken(name)} to choose from", check=is_good, must=rule)


def space_of(workload_class: type[Workload], values: Mapping[str, Any]) -> Space:
    """Return the space within the bounds that ``values``, those of ``space_config``, set. Raises UsageError."""
    bounds = settings.values_of(settings.build(space_config(workload_class), values))
    spaces: dict[str, SearchSpace] = {}
    types, defaults = {}, {}
    for name, (space, field, annotation) in searched(workload_class).items():
        types[name] = value_type(annotation)[0]
        defaults[name] = workload_class.recipes.get("default", {}).get(name, field.default)
        if isinstance(space, Choice):
            (bound,) = bound_names(name, space)
            spaces[name] = Choice(tuple(bounds[bound]))
            continue
        least, most = bound_names(name, space)
        low, high = bounds[least], bounds[most]
        if low > high:
            raise UsageError(f"{flag(least)} {low:g} must not be above {flag(most)} {high:g}")
        spaces[name] = Range(low, high, space.log)
    if not spaces:
        raise UsageError(f"nothing to search: no setting of {workload_class.__name__} has a search space")
    return Space(spaces, types, defaults)


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
