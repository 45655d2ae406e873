"""Declares, checks, reads and writes settings: one typed field defines a setting for flags, files and code."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from mnist_ray.errors import UsageError, did_you_mean, first_line, redact

T = TypeVar("T")
Check = Callable[[Any], bool]
UNSET = argparse.SUPPRESS  # a flag that is not given leaves no value


@dataclass(frozen=True)
class Choice:
    """A search space of a few values."""

    options: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.options, Sequence) or isinstance(self.options, str) or not self.options:
            raise UsageError(f"Choice({self.options!r}) needs a tuple of values, such as Choice((16, 32))")


@dataclass(frozen=True)
class Range:
    """A search space between two numbers, both included; whole numbers for a setting of type int."""

    low: float
    high: float
    log: bool = False  # sample the logarithm uniformly


SearchSpace = Choice | Range


def setting(
    default: T,
    description: str,
    *,
    check: Check | None = None,
    must: str = "",
    search: SearchSpace | None = None,
    decides_data: bool = False,
    decides_weights: bool = True,
    is_searchable: bool = True,
    unset: str = "none",
) -> T:
    """Declare a field of a settings class.

    ``description`` is the flag's help: unit, scope, and ``default: …`` if None lets the job choose. If ``check`` is
    false for a value, the error says ``must``; ``**at_least(1)`` and the like give both. ``search``: the values that
    ``jobs/tune.py`` tries. ``decides_data``: ``load_data`` reads it, so all trials share it: it cannot be searched.
    If not ``decides_weights``, a resumed run may have another value. If not ``is_searchable``, all trials of a sweep
    have the same. ``unset``: the word for None on the command line.
    """
    more = {"decides_data": decides_data, "decides_weights": decides_weights, "is_searchable": is_searchable}
    metadata = {"help": description, "check": check, "must": must, "search": search, "unset": unset, **more}
    return dataclasses.field(default=default, metadata=metadata)


def rule(check: Check, must: str) -> dict[str, Any]:
    """Return ``check`` and ``must`` for ``setting``; None always passes: the type decides whether None is allowed."""
    return {"check": lambda value: value is None or check(value), "must": must}


def at_least(minimum: float) -> dict[str, Any]:
    """Allow numbers from ``minimum``."""
    return rule(lambda value: value >= minimum, f"must be at least {minimum}")


def positive() -> dict[str, Any]:
    """Allow finite numbers above 0."""
    return rule(lambda value: math.isfinite(value) and value > 0, "must be a positive number")


def within(low: float, high: float) -> dict[str, Any]:
    """Allow numbers from ``low`` to ``high``, both included."""
    return rule(lambda value: low <= value <= high, f"must be {low:,} to {high:,}")


def fraction(*, with_one: bool = True) -> dict[str, Any]:
    """Allow numbers from 0 to 1; 1 itself only if ``with_one``."""
    end = "]" if with_one else ")"
    return rule(lambda value: 0 <= value < 1 or (with_one and value == 1), f"must be in [0, 1{end}")


def flag(name: str) -> str:
    """Return the flag of a setting: ``batch_size`` is ``--batch-size``."""
    return "--" + name.replace("_", "-")


def value_type(annotation: Any) -> tuple[type[Any], tuple[Any, ...]]:
    """Return a setting's plain type, and the choices of a ``Literal`` or the item type of a tuple."""
    if get_origin(annotation) in (Union, types.UnionType):  # X | None
        annotation = next(arg for arg in get_args(annotation) if arg is not type(None))
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return type(arguments[0]), arguments
    return origin or annotation, arguments if origin is tuple else ()


def parse_text(kind: type[Any], text: str) -> Any:
    """Turn ``str(value)`` back into a value of the type ``kind``. Raises ValueError."""
    if kind is not bool:
        return kind(text)
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


_hints_of = functools.cache(get_type_hints)  # a sweep checks thousands of configurations


def checked(config_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's settings in ``values``, each checked by itself. Raises UsageError for a wrong value."""
    hints = _hints_of(config_class)
    given = [field for field in dataclasses.fields(config_class) if field.name in values]
    return {field.name: _checked_value(field, hints[field.name], values[field.name]) for field in given}


def build(config_class: type[T], values: Mapping[str, Any]) -> T:
    """Build a config from ``values``, ignoring other configs' settings. Raises UsageError for a wrong value."""
    try:
        return config_class(**checked(config_class, values))
    except ValueError as error:  # of a workload's own __post_init__
        raise UsageError(first_line(error)) from error


def _checked_value(field: dataclasses.Field[Any], annotation: Any, value: Any) -> Any:
    if value is None and type(None) in get_args(annotation):
        return None
    name, (plain, arguments) = flag(field.name), value_type(annotation)
    try:
        if plain is tuple and isinstance(value, (list, tuple)):
            value = tuple(_of_type(arguments[0], item, name) for item in value)
        else:
            value = _of_type(plain, value, name)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        kind = f"a list of {arguments[0].__name__}" if plain is tuple else f"of type {plain.__name__}"
        raise UsageError(f"{name} must be {kind}, not {value!r:.40}") from None
    if plain is not tuple and arguments and value not in arguments:
        raise UsageError(f"{name} must be one of {', '.join(map(str, arguments))}, not {value!r}")
    check: Check | None = field.metadata.get("check")
    if check and not check(value):
        raise UsageError(f"{name} {field.metadata['must']}, not {value!r}")
    return value


def _of_type(kind: type[Any], value: Any, name: str) -> Any:
    if kind is Path and isinstance(value, (str, Path)):
        return path_of(value, name).absolute()  # saved with the run, and read later in another working folder
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):  # a number of NumPy or torch; an array of several numbers raises
        value = value.item()
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind or value != value:  # bool is a subclass of int; NaN differs from itself
        raise TypeError
    if kind is int and abs(value) >= 2**63:  # NumPy and torch cannot hold it
        raise OverflowError
    return value


def _or_none(kind: type[Any], unset: str) -> Callable[[str], Any]:
    """Return a parser of a flag's text, which may also be the word for None."""

    def parse(text: str) -> Any:
        return None if text == unset else kind(text)

    parse.__name__ = kind.__name__  # argparse says: invalid float value
    return parse


def path_of(text: str | Path, named: str) -> Path:
    """Return a path with ``~`` expanded. Raises UsageError for an impossible path; the message calls it ``named``."""
    if not str(text).strip():
        raise UsageError(f"{named} is empty; name a file or a folder")
    try:
        path = Path(text).expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # reported when the path is used
        pass
    except (OSError, TypeError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        raise UsageError(f"{named} {text}: {getattr(error, 'strerror', None) or first_line(error)}") from error
    return path


def is_no_file(path: str | Path) -> bool:
    """Tell whether a path leads to something else than a file: reading a FIFO may wait forever, a device never ends."""
    return os.path.exists(path) and not os.path.isfile(path)


def names_of(config_classes: Iterable[type]) -> set[str]:
    """Return the names of all settings of the classes."""
    return {field.name for config_class in config_classes for field in dataclasses.fields(config_class)}


def values_of(*configs: Any) -> dict[str, Any]:
    """Return all settings of the configs as one dict, as in config.json."""
    values = {name: value for config in configs for name, value in dataclasses.asdict(config).items()}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def read_config_file(path: str) -> dict[str, Any]:
    """Read settings from a JSON file. Raises UsageError."""
    file = path_of(path, "--config")
    try:
        if is_no_file(file):
            raise UsageError(f"the config file {path} is not a file")
        pairs = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=tuple)
    except OSError as error:
        raise UsageError(f"cannot read the config file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # including text that is not UTF-8
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(pairs, tuple):
        raise UsageError(f"{path} must hold a JSON object of settings")
    values, names = dict(pairs), [name for name, _ in pairs]
    if twice := [name for name in values if names.count(name) > 1]:
        raise UsageError(f"{path} has {twice[0]} twice; leave one of them out")
    if not isinstance(workload := values.get("workload"), str | None):
        raise UsageError(f"{path}: --workload must be of type str, not {workload!r:.40}")
    return values


def check_known(values: Iterable[str], known: set[str], source: str) -> None:
    """Raise UsageError if ``source``, a file or a call, has unknown settings."""
    if unknown := sorted(set(values) - known):
        raise UsageError(f"{source} has unknown settings: {', '.join(unknown)}{did_you_mean(unknown[0], known)}")


def json_lines(values: Mapping[str, Any]) -> str:
    """Return a JSON object with one key per line."""
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()) + "\n}\n"


class Parser(argparse.ArgumentParser):
    """An argument parser with a flag for each setting of some classes. It reports errors in one line.

    ``--help`` shows ``defaults`` in place of the settings' own defaults.
    """

    def __init__(self, description: str, *config_classes: type, defaults: Mapping[str, Any] | None = None) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self._config_classes = config_classes
        for config_class in config_classes:
            self._add_settings(config_class, defaults or {})

    def _add_settings(self, config_class: type, defaults: Mapping[str, Any]) -> None:
        title = (config_class.__doc__ or "").split(":")[0].strip().rstrip(".")
        # A dataclass without a docstring gets one from Python, such as "Settings(width: int = 32)".
        group = self.add_argument_group("The workload's settings" if "(" in title else title)
        hints = get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            plain, arguments = value_type(hints[field.name])
            unset = field.metadata.get("unset", "none")  # a workload's fields may be plain
            kind: dict[str, Any] = {"type": plain, "choices": arguments or None}
            if plain is bool:
                kind = {"action": argparse.BooleanOptionalAction}
            elif plain in (int, float) and not arguments and type(None) in get_args(hints[field.name]):
                kind = {"type": _or_none(plain, unset)}
            elif plain is tuple:
                kind = {"type": arguments[0], "nargs": "+", "action": "extend"}
            elif plain is Path:
                kind = {"type": str}  # Path("") would be the current folder
            help_text = field.metadata.get("help", "")
            default = defaults.get(field.name, field.default)
            if default is None and unset != "none":
                default = unset
            if plain is not bool and default is not None:
                shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
                help_text += f" (default: {shown})"
            group.add_argument(flag(field.name), default=UNSET, help=help_text.replace("%", "%%"), **kind)

    def read_flags(self, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """Return the given flags, after checking them. Raises UsageError."""
        found, unknown = self.parse_known_intermixed_args(arguments)
        if unknown:
            flags = [text for action in self._actions for text in action.option_strings]
            wrong = [text.partition("=")[0] for text in unknown if text.startswith("--")]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(wrong[0], flags) if wrong else ''}")
        for config_class in self._config_classes:
            checked(config_class, vars(found))
        return vars(found)

    def error(self, message: str) -> NoReturn:
        """Print one line, not the whole usage, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {redact(message)}; see --help\n")


def peek(*names: str) -> tuple[dict[str, Any], str | None]:
    """Return some flags' values, and the run's name if one is given, while most flags are not yet known.

    A word after an unknown flag may be its value, so it is taken for the name only if there is no other candidate.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        parser.add_argument(flag(name), default=UNSET, action="store_true" if name == "resume" else "store")
    try:
        found, rest = parser.parse_known_args()
    except argparse.ArgumentError:  # reported when all flags are read
        return {}, None
    pairs = [(before, word) for before, word in itertools.pairwise(["", *rest]) if not word.startswith("-")]
    pairs.sort(key=lambda pair: pair[0].startswith("-") and "=" not in pair[0])
    return vars(found), next((word for _, word in pairs), None)
