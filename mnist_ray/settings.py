"""How a setting is declared, checked, read and written: one typed field, shared by the flag, the file and the code.

Standard library only, so that a wrong flag is answered before anything heavy is imported.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mnist_ray.errors import UsageError, did_you_mean, first_line

T = TypeVar("T")
Check = Callable[[Any], bool]


@dataclass(frozen=True)
class Choice:
    """A search space of a few values."""

    options: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A search space between two numbers, both included; whole numbers if the setting is one."""

    low: float
    high: float
    log: bool = False  # whether each power of ten is as likely as any other


SearchSpace = Choice | Range


def setting(
    default: T,
    description: str,
    *,
    check: Check | None = None,
    must: str = "",
    search: SearchSpace | None = None,
    decides_data: bool = False,
) -> T:
    """Declare a field of a settings class.

    ``description`` has its unit and scope. A value for which ``check`` is false is refused with ``must``; ``at_least``,
    ``positive`` and the like give both. ``search`` is where ``jobs/tune.py`` looks for the best value.
    ``decides_data``: ``load_data`` goes by it, so it cannot be searched, as all trials have the same data.
    """
    metadata = {"help": description, "check": check, "must": must, "search": search, "decides_data": decides_data}
    return dataclasses.field(default=default, metadata=metadata)


def _rule(check: Check, must: str) -> dict[str, Any]:
    """Return a rule that None passes: whether a setting may be None, its type says."""
    return {"check": lambda value: value is None or check(value), "must": must}


def at_least(minimum: float) -> dict[str, Any]:
    """Return what ``setting`` takes for a number from ``minimum`` on."""
    return _rule(lambda value: value >= minimum, f"must be at least {minimum}")


def positive() -> dict[str, Any]:
    """Return what ``setting`` takes for a positive number."""
    return _rule(lambda value: math.isfinite(value) and value > 0, "must be a positive number")


def within(low: float, high: float) -> dict[str, Any]:
    """Return what ``setting`` takes for a number from ``low`` to ``high``, both included."""
    return _rule(lambda value: low <= value <= high, f"must be {low:,} to {high:,}")


def fraction(*, with_one: bool = True) -> dict[str, Any]:
    """Return what ``setting`` takes for a number from 0 to 1; ``with_one`` tells whether 1 is one of them."""
    end = "]" if with_one else ")"
    return _rule(lambda value: 0 <= value < 1 or (with_one and value == 1), f"must be in [0, 1{end}")


def flag(name: str) -> str:
    """Return the flag of a setting: ``batch_size`` is ``--batch-size``."""
    return "--" + name.replace("_", "-")


def value_type(annotation: Any) -> tuple[type[Any], tuple[Any, ...] | None]:
    """Return a setting's plain type, and its choices if it is a ``Literal``; of a tuple, ``tuple``."""
    annotation = _without_none(annotation)
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        return type(choices[0]), choices
    return get_origin(annotation) or annotation, None


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(arg for arg in get_args(annotation) if arg is not type(None))
    return annotation


def item_type(annotation: Any) -> type[Any]:
    """Return the type of a tuple's items."""
    return get_args(_without_none(annotation))[0]


def parse_text(kind: type[Any], text: str) -> Any:
    """Return the value of a type that a text stands for, as ``str`` has written it. Raises ValueError."""
    if kind is not bool:
        return kind(text)
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def build(config_class: type[T], values: Mapping[str, Any]) -> T:
    """Build a config from those of ``values`` that it has, checking each against its type and its rule.

    Raises UsageError for a value of the wrong type or outside its range.
    """
    hints = get_type_hints(config_class)
    given = [field for field in dataclasses.fields(config_class) if field.name in values]  # type: ignore[arg-type]
    return config_class(**{field.name: _checked(field, hints[field.name], values[field.name]) for field in given})


def _checked(field: dataclasses.Field[Any], annotation: Any, value: Any) -> Any:
    if value is None and type(None) in get_args(annotation):
        return None
    name, (plain, choices) = flag(field.name), value_type(annotation)
    try:
        value = _of_type(annotation, value, name)
    except TypeError:
        kind = f"a list of {item_type(annotation).__name__}" if plain is tuple else f"of type {plain.__name__}"
        raise UsageError(f"{name} must be {kind}, not {value!r}") from None
    if choices and value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")
    check: Check | None = field.metadata.get("check")
    if check and not check(value):
        raise UsageError(f"{name} {field.metadata['must']}, not {value!r}")
    return value


def _of_type(annotation: Any, value: Any, name: str) -> Any:
    """Return a value as its setting has it. Raises TypeError if it is of another type."""
    plain, _ = value_type(annotation)
    if plain is tuple and isinstance(value, (list, tuple)):
        return tuple(_of_type(item_type(annotation), item, name) for item in value)
    if plain is Path and isinstance(value, (str, Path)):
        return path_of(value, name).absolute()  # it is saved with the run, and read again from anywhere
    if plain is float and type(value) is int:
        return float(value)
    if type(value) is not plain:
        raise TypeError
    return value


def path_of(text: str | Path, named: str) -> Path:
    """Return the path that a user has typed as ``named``, without ``~``. Raises UsageError if there can be none."""
    if not str(text).strip():
        raise UsageError(f"{named} is empty; name a file or a folder")
    try:
        path = Path(text).expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # whoever uses it says so
        pass
    except RuntimeError as error:
        raise UsageError(f"{named} {text}: there is no such user, or no home folder") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{named} {text}: {getattr(error, 'strerror', None) or first_line(error)}") from error
    return path


def names_of(config_classes: Iterable[type]) -> set[str]:
    """Return the names of all settings of some classes."""
    return {field.name for config_class in config_classes for field in dataclasses.fields(config_class)}


def values_of(*configs: Any) -> dict[str, Any]:
    """Return the settings of some configs as flat values, as a config file holds them."""
    values = {name: value for config in configs for name, value in dataclasses.asdict(config).items()}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def read_config_file(path: str) -> dict[str, Any]:
    """Read the settings in a JSON file. Raises UsageError if it is no JSON object."""
    try:
        values = json.loads(path_of(path, "--config").read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the config file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # of a file that is no UTF-8, too
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold a JSON object with one setting a line")
    return values


def check_known(values: Iterable[str], known: set[str], source: str) -> None:
    """Raise UsageError if there are settings in a file or a call that nothing knows."""
    if unknown := sorted(set(values) - known):
        raise UsageError(f"{source} has unknown settings: {', '.join(unknown)}{did_you_mean(unknown[0], known)}")


def json_lines(values: Mapping[str, Any]) -> str:
    """Return a JSON object with one key a line."""
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()) + "\n}\n"
