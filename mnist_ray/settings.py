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

from mnist_ray.errors import UsageError, first_line

T = TypeVar("T")
Check = Callable[[Any], bool]


@dataclass(frozen=True)
class Choice:
    """A search space of a few values."""

    options: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A search space between two numbers, both included; whole numbers where the setting is one."""

    low: float
    high: float
    log: bool = False
    """Whether each power of ten is as likely as any other."""


SearchSpace = Choice | Range


def setting(
    default: T,
    help: str,  # noqa: A002
    *,
    check: Check | None = None,
    must: str = "",
    search: SearchSpace | None = None,
    resets: tuple[str, ...] = (),
    decides_data: bool = False,
) -> T:
    """Declare a field of a settings class.

    ``help`` has its unit and scope. A value for which ``check`` is false is refused with ``must``; ``at_least`` and
    ``positive`` give both. ``search`` is where ``jobs/tune.py`` looks for the best value. ``resets`` names settings
    that go back to their defaults where the flag of this one is given, whatever a file says of them.
    ``decides_data``: ``load_data`` goes by it, so it cannot be searched, as all trials have the same data.
    """
    metadata: dict[str, Any] = {"help": help, "check": check, "must": must, "search": search, "resets": resets}
    return dataclasses.field(default=default, metadata=metadata | {"decides_data": decides_data})


def at_least(minimum: float) -> dict[str, Any]:
    """Return what ``setting`` takes for a number from ``minimum`` on."""
    return {"check": lambda value: value is None or value >= minimum, "must": f"must be at least {minimum}"}


def positive() -> dict[str, Any]:
    """Return what ``setting`` takes for a positive number."""
    return {
        "check": lambda value: value is None or (math.isfinite(value) and value > 0),
        "must": "must be a positive number",
    }


def fraction(*, with_one: bool = True) -> dict[str, Any]:
    """Return what ``setting`` takes for a number from 0 to 1; ``with_one`` tells whether 1 is one of them."""
    if with_one:
        return {"check": lambda value: 0 <= value <= 1, "must": "must be in [0, 1]"}
    return {"check": lambda value: 0 <= value < 1, "must": "must be in [0, 1)"}


def flag(name: str) -> str:
    """Return the flag of a setting: ``batch_size`` is ``--batch-size``."""
    return "--" + name.replace("_", "-")


def value_type(annotation: Any) -> tuple[type[Any], tuple[Any, ...] | None]:
    """Return a setting's plain type, and its choices where it is a ``Literal``; of a tuple, ``tuple``."""
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
    chosen = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        if field.name in values:
            chosen[field.name] = _checked(field, hints[field.name], values[field.name])
    return config_class(**chosen)


def _checked(field: dataclasses.Field[Any], annotation: Any, value: Any) -> Any:
    shown = flag(field.name)
    plain, choices = value_type(annotation)
    if value is None and type(None) in get_args(annotation):
        return None
    if plain is float and type(value) is int:
        value = float(value)
    if plain is tuple and type(value) in (list, tuple):
        is_float = item_type(annotation) is float
        value = tuple(float(item) if is_float and type(item) is int else item for item in value)
    if plain is Path and isinstance(value, (str, Path)):  # it is saved with the run, and read again from anywhere
        value = path_of(value, shown).absolute()
    is_of_type = isinstance(value, Path) if plain is Path else type(value) is plain
    if not is_of_type or (plain is tuple and any(type(item) is not item_type(annotation) for item in value)):
        kind = f"a list of {item_type(annotation).__name__}" if plain is tuple else f"of type {plain.__name__}"
        raise UsageError(f"{shown} must be {kind}, not {value!r}")
    if choices and value not in choices:
        raise UsageError(f"{shown} must be one of {', '.join(map(str, choices))}, not {value!r}")
    check: Check | None = field.metadata.get("check")
    if check and not check(value):
        raise UsageError(f"{shown} {field.metadata['must']}, not {value!r}")
    return value


def path_of(text: str | Path, named: str) -> Path:
    """Return the path that a user has typed as ``named``, without ``~``. Raises UsageError where there can be none."""
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
        raise UsageError(f"{named} {text}: {_reason(error)}") from error
    return path


def names_of(config_classes: Iterable[type]) -> set[str]:
    """Return the names of all settings of some classes."""
    return {field.name for config_class in config_classes for field in dataclasses.fields(config_class)}


def values_of(*configs: Any) -> dict[str, Any]:
    """Return the settings of some configs as flat values, as a config file holds them."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for config in configs
        for name, value in dataclasses.asdict(config).items()
    }


def read_config_file(path: str) -> dict[str, Any]:
    """Read the settings in a JSON file. Raises UsageError where it is no JSON object."""
    try:
        text = path_of(path, "--config").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the config file {path}: {_reason(error)}") from error
    return parse_config(text, path)


def parse_config(text: str, source: str) -> dict[str, Any]:
    """Parse the JSON text of a config file; ``source`` names it in errors. Raises UsageError."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{source} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{source} must hold a JSON object with one setting a line")
    return values


def check_known(values: Iterable[str], known: set[str], source: str) -> None:
    """Raise UsageError where there are settings in a file that nothing knows."""
    unknown = sorted(set(values) - known)
    if unknown:
        raise UsageError(f"{source} has unknown settings: {', '.join(unknown)}")


def json_lines(values: Mapping[str, Any]) -> str:
    """Return a JSON object with one key a line."""
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()) + "\n}\n"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)
