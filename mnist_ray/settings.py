"""Declares, checks and writes settings: one typed field defines a setting for flags, files and code."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import math
import os
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mnist_ray.errors import UsageError, first_line
from mnist_ray.text import did_you_mean

T = TypeVar("T", bound=Any)
Check = Callable[[Any], object]  # which is true if a value is allowed
Given = Mapping[str, Any]
"""Settings by name, from flags or keyword arguments, including ``workload``, ``recipe`` and ``config``."""
_CALL = re.compile(r"(.*?\.py(?::\w+)?|[\w.]+(?::\w+)?)\((.*)\)", re.DOTALL)  # a folder may have parentheses, too


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


@dataclass(frozen=True)
class Setting:
    """A declared setting: its field's name, default and type, and what is given to ``setting``."""

    name: str = ""
    default: Any = None
    plain: type[Any] = object  # without `| None`
    arguments: tuple[Any, ...] = ()  # the choices of a Literal, or the item type of a tuple
    may_be_none: bool = False
    help: str = ""  # unit, scope, and `default: …` if None lets the job choose
    check: Check | None = None  # if it is false for a value, the error prints `must`; `**at_least(1)` sets both
    must: str = ""
    search: SearchSpace | None = None  # the values that jobs/tune.py tries
    code: str = ""  # the value names a user's class; this is its base class, as MODULE:NAME
    paths: str = ""  # a pattern of the texts that are paths: in a file that people write, they start at its folder
    bare: Any = None  # the value of the flag given without one
    unset: str = "none"  # the word for None on the command line
    metavar: str | None = None  # the word for a value in the help
    word: str = ""  # the command takes the value without a flag; this is the help's word for it
    decides_data: bool = False  # load_data reads it, so all trials of a sweep share it: it cannot be searched
    decides_weights: bool = True  # a resumed run must not have another value
    is_searchable: bool = True  # the trials of a sweep may have different values
    is_repeated: bool = False  # a flag for each of several values, instead of one flag before all
    has_flag: bool = True  # otherwise, settings files, keywords and --set NAME=VALUE set it

    @property
    def shown(self) -> str:
        """What messages call the setting."""
        return self.word or (flag(self.name) if self.has_flag else f"--set {self.name}")

    @property
    def item(self) -> type[Any]:
        """The type of one value: of a list, of its items."""
        return self.arguments[0] if self.plain is tuple else self.plain

    def parsed(self, given: Any) -> Any:
        """Return the value that a text of the command line means; if it means none, the text, which is then wrong."""
        if isinstance(given, list):
            return [self.parsed(text) for text in given]
        try:
            is_text = isinstance(given, str) and self.item in (bool, int, float)
            return parse_text(self.item, given) if is_text else given
        except ValueError:
            return given

    def checked(self, value: Any, folder: Path | None = None) -> Any:
        """Return a value in the setting's type. Raises UsageError for a wrong value.

        ``folder``: where relative paths start; None: paths start in the current folder, and code is named as it is.
        """
        is_word_for_none = isinstance(value, str) and value == self.unset and self.plain in (int, float)
        if self.may_be_none and (value is None or is_word_for_none):
            return None
        if isinstance(value, bool) and {"yes", "no"} <= {*self.arguments}:
            value = "yes" if value else "no"
        try:
            value = self._converted(value, folder)
        except (TypeError, ValueError, ArithmeticError, RuntimeError, MemoryError):
            items = f"a list of {self.item.__name__}" if self.plain is tuple else f"of type {self.plain.__name__}"
            kind = "FILE.py:NAME or a list of these" if self.code else items
            raise UsageError(f"{self.shown} must be {kind}, not {value!r:.40}") from None
        if self.plain is not tuple and self.arguments and value not in self.arguments:
            raise UsageError(f"{self.shown} must be one of {', '.join(map(str, self.arguments))}, not {value!r}")
        if self.check and not self.check(value):
            raise UsageError(f"{self.shown} {self.must}, not {value!r}")
        return value

    def _converted(self, value: Any, folder: Path | None) -> Any:
        if self.plain is not tuple:
            return self._converted_one(value, folder)
        if value is None and self.code:
            return ()
        items = [value] if self.item is str and isinstance(value, (str, Path)) else value
        if not isinstance(items, (list, tuple)):
            raise TypeError
        return tuple(self._converted_one(item, folder) for item in items)

    def _converted_one(self, value: Any, folder: Path | None) -> Any:
        kind = self.item
        if kind is Path and isinstance(value, (str, Path)):
            return Path(folder or "", path_of(value, self.shown)).absolute()  # saved with the run, and read elsewhere
        if kind is str and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if hasattr(value, "item"):  # a NumPy or torch number; an array of several numbers raises
            value = value.item()
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or value != value:  # bool is a subclass of int; NaN differs from itself
            raise TypeError
        if kind is int and abs(value) >= 2**63:  # NumPy and torch cannot hold it
            raise OverflowError
        if self.code:
            split_call(value, self.shown)
        is_path = folder is not None and self.paths and re.search(self.paths, value)
        return str(Path(folder or "", value)) if is_path and value[0] != "~" and "://" not in value else value


def setting(default: T, description: str, **more: Any) -> T:
    """Declare a field of a settings class.

    ``description``: the flag's help. ``more``: attributes of ``Setting``, such as ``search``, a ``Choice`` or a
    ``Range``; ``check``, a function of a value, and ``must``, which the error prints if it returns false, like
    ``must be odd``; and ``decides_data``, whether ``load_data`` reads the setting.
    """
    return dataclasses.field(default=default, metadata={"setting": Setting(help=description, **more)})


def rule(check: Check, must: str) -> dict[str, Any]:
    """Return ``check`` and ``must`` for ``setting``; None always passes: the type decides whether None is allowed."""
    return {"check": lambda value: value is None or check(value), "must": must}


def at_least(minimum: float) -> dict[str, Any]:
    """Allow numbers of at least ``minimum``."""
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


def declared(*config_classes: type) -> dict[str, Setting]:
    """Return the settings of some classes by their names."""
    return {name: about for config_class in config_classes for name, about in _declared(config_class).items()}


@functools.cache  # a sweep checks thousands of configurations
def _declared(config_class: Any) -> dict[str, Setting]:
    found, hints = {}, get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        told, of_type = field.metadata.get("setting", Setting()), _type_of(hints[field.name])
        found[field.name] = dataclasses.replace(told, name=field.name, default=field.default, **of_type)
    return found


def _type_of(annotation: Any) -> dict[str, Any]:
    """Return the attributes of a setting that its field's type determines."""
    may_be_none = type(None) in get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):  # X | None
        annotation = next(arg for arg in get_args(annotation) if arg is not type(None))
    origin, arguments = get_origin(annotation), get_args(annotation)
    plain = type(arguments[0]) if origin is Literal else origin or annotation
    arguments = arguments if origin in (Literal, tuple) else ()
    return {"plain": plain, "arguments": arguments, "may_be_none": may_be_none}


def parse_text(kind: type[Any], text: str) -> Any:
    """Turn ``str(value)`` back into a value of the type ``kind``. Raises ValueError."""
    if kind is not bool:
        return kind(text)
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def build(config_class: type[T], values: Given) -> T:
    """Build a config from ``values``, ignoring other configs' settings. Raises UsageError for a wrong value."""
    own = {name: about.checked(values[name]) for name, about in declared(config_class).items() if name in values}
    try:
        return config_class(**own)
    except ValueError as error:  # from a workload's own __post_init__
        raise UsageError(first_line(error)) from error


def split_call(reference: str, named: str = "code") -> tuple[str, dict[str, Any]]:
    """Return a reference such as ``a.py:Freeze(epochs=2)`` without its keyword arguments, and these.

    Raises UsageError if the arguments are wrong; the message begins with ``named``.
    """
    if not (found := _CALL.fullmatch(reference)):
        return reference, {}
    try:
        call: Any = ast.parse(f"f({found[2]})", mode="eval").body
        if call.args or None in (words := {word.arg: ast.literal_eval(word.value) for word in call.keywords}):
            raise ValueError
    except (SyntaxError, ValueError, AttributeError) as error:
        reason = "arguments must be NAME=VALUE, and values numbers, strings, lists or dicts"
        raise UsageError(f"{named} {reference:.60}: {reason}") from error
    return found[1], words


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
    """Return whether a path exists but is not a file: reading a FIFO or a device may never end."""
    return os.path.exists(path) and not os.path.isfile(path)


def values_of(*configs: Any) -> dict[str, Any]:
    """Return all settings of the configs as one dict, as in config.json."""
    values = {name: value for config in configs for name, value in dataclasses.asdict(config).items()}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def check_known(values: Iterable[str], known: Collection[str], source: str) -> None:
    """Raise UsageError if ``source``, a file or a call, has unknown settings."""
    if unknown := sorted({*values}.difference(known)):
        raise UsageError(f"{source} has unknown settings: {', '.join(unknown)}{did_you_mean(unknown[0], known)}")


def json_lines(values: Mapping[str, Any]) -> str:
    """Return a JSON object with one key per line."""
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()) + "\n}\n"
