"""Declares, checks, reads and writes settings: one typed field defines a setting for flags, files and code."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from mnist_ray.errors import UsageError, first_line
from mnist_ray.references import references_of
from mnist_ray.text import did_you_mean, redact

T = TypeVar("T")
Check = Callable[[Any], bool]
Given = Mapping[str, Any]
"""Settings by name, from flags or keyword arguments, including ``workload``, ``recipe`` and ``config``."""
_WORDS: dict[type, str] = {int: "N", float: "X", str: "TEXT", Path: "PATH"}  # for a flag's value in the help
UNSET = argparse.SUPPRESS  # a flag that is not given leaves no value
_NOTHING: Given = {}


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
    bare: Any = None  # the value of the flag given without one
    unset: str = "none"  # the word for None on the command line
    metavar: str | None = None  # the word for a value in the help
    word: str = ""  # the command takes the value without a flag; this is the help's word for it
    decides_data: bool = False  # load_data reads it, so all trials of a sweep share it: it cannot be searched
    decides_weights: bool = True  # a resumed run must not have another value
    is_searchable: bool = True  # the trials of a sweep may have different values
    is_single: bool = False  # giving the flag twice is an error
    is_repeated: bool = False  # each value has a flag of its own, as also with ``code``
    on_resume: Literal["saved", "given", "dropped"] = "saved"  # saved with the run; given again on resume; or neither
    has_flag: bool = True  # otherwise, settings files, keywords and --set NAME=VALUE set it

    @property
    def shown(self) -> str:
        """What messages call the setting."""
        return self.word or (flag(self.name) if self.has_flag else f"--set {self.name}")

    @property
    def has_word_for_none(self) -> bool:
        """Whether ``unset`` stands for None. In a text, any word would be the value itself."""
        return self.may_be_none and self.plain in (int, float)

    @property
    def form(self) -> dict[str, Any]:
        """The flag's arguments for ``add_argument``."""
        if self.plain is bool:
            return {"action": argparse.BooleanOptionalAction}
        if self.code or self.is_repeated:
            return {"action": "append", "metavar": self.metavar}
        if self.word:
            return {"nargs": "*" if self.plain is tuple else "?" if self.may_be_none else None, "metavar": self.word}
        if self.plain is tuple:
            return {"type": self.arguments[0], "nargs": "+", "action": "extend", "metavar": self.metavar}
        word = self.metavar or (None if self.arguments else _WORDS[self.plain])
        if self.has_word_for_none and not self.arguments:
            return {"type": _or_none(self.plain, self.unset), "metavar": word}
        kind = str if self.plain is Path else self.plain  # Path("") would be the current folder
        number = {} if self.bare is None else {"nargs": "?", "const": self.bare}
        return {"type": kind, "choices": self.arguments or None, "metavar": word, **number}

    def help_with(self, default: Any) -> str:
        """Return the flag's help with a default, if there is one."""
        if default is None and self.unset != "none":
            default = self.unset
        if self.plain is bool or default in (None, (), ""):
            return self.help
        return f"{self.help} (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"

    def checked(self, value: Any) -> Any:
        """Return a value in the setting's type. Raises UsageError for a wrong value."""
        if (self.may_be_none and value is None) or (self.has_word_for_none and value == self.unset):
            return None
        if isinstance(value, bool) and {"yes", "no"} <= {*self.arguments}:
            value = "yes" if value else "no"
        name, plain, arguments = self.shown, self.plain, self.arguments
        if self.code:
            try:
                value = references_of(value)
            except ValueError as error:
                raise UsageError(f"{name} {value!r:.60}: {error}") from None
            except (TypeError, RecursionError, MemoryError):
                forms = "FILE.py:NAME, a list of these, or a mapping from these to keyword arguments"
                raise UsageError(f"{name} must be {forms}, not {value!r:.40}") from None
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
        if self.check and not self.check(value):
            raise UsageError(f"{name} {self.must}, not {value!r}")
        return value


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


def _declared(*config_classes: type) -> dict[str, Setting]:
    found = {}
    for config_class in config_classes:
        hints = get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            told, of_type = field.metadata.get("setting", Setting()), _type_of(hints[field.name])
            found[field.name] = dataclasses.replace(told, name=field.name, default=field.default, **of_type)
    return found


declared: Callable[..., dict[str, Setting]] = functools.cache(_declared)  # a sweep checks thousands of configurations
"""Return the settings of some classes by their names."""


def checked(values: Mapping[str, Any], *config_classes: type) -> dict[str, Any]:
    """Return the classes' settings in ``values``, each checked by itself. Raises UsageError for a wrong value."""
    return {name: about.checked(values[name]) for name, about in declared(*config_classes).items() if name in values}


def build(config_class: type[T], values: Mapping[str, Any]) -> T:
    """Build a config from ``values``, ignoring other configs' settings. Raises UsageError for a wrong value."""
    try:
        return config_class(**checked(values, config_class))
    except ValueError as error:  # from a workload's own __post_init__
        raise UsageError(first_line(error)) from error


def _of_type(kind: type[Any], value: Any, name: str) -> Any:
    if kind is Path and isinstance(value, (str, Path)):
        return path_of(value, name).absolute()  # saved with the run, and read later in another working folder
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):  # a NumPy or torch number; an array of several numbers raises
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

    parse.__name__ = kind.__name__  # argparse reports: invalid float value
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


def title_of(config_class: type) -> str:
    """Return the title of a class of settings: its docstring up to a colon."""
    title = (config_class.__doc__ or "").split(":")[0].strip().rstrip(".")
    # A dataclass without a docstring gets one from Python, such as "Settings(width: int = 32)".
    return "The workload's settings" if "(" in title else title


class Parser(argparse.ArgumentParser):
    """An argument parser with a flag for each setting of some classes. It reports errors in one line.

    ``--help`` shows ``defaults`` instead of the settings' own, and the flags in ``first`` before the others.
    ``choices``: values that the declarations lack.
    """

    def __init__(
        self,
        description: str,
        *classes: type,
        defaults: Given = _NOTHING,
        choices: Given = _NOTHING,
        first: Sequence[str] = (),
    ) -> None:
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self._config_classes = classes
        groups: dict[str, Any] = {"Options": self}  # beside --help
        settings = declared(*classes)
        title_by_name = {name: title_of(one) for one in classes for name in declared(one)}
        others = sorted((name for name in settings if name not in first), key=lambda name: not settings[name].word)
        for name in [*first, *others]:
            about, title = settings[name], "Most used" if name in first else title_by_name[name]
            if not about.has_flag:
                continue
            if title not in groups:
                groups[title] = self.add_argument_group(title)
            form = about.form | ({"choices": choices[name], "metavar": None} if name in choices else {})
            help_text = about.help_with(defaults.get(name, about.default)).replace("%", "%%")
            groups[title].add_argument(name if about.word else flag(name), default=UNSET, help=help_text, **form)
        self._without_flag = {name: about for name, about in settings.items() if not about.has_flag}
        if self._without_flag:
            rare = self.add_argument_group("Settings without a flag of their own")
            names = f"one of {', '.join(self._without_flag)}"
            rare.add_argument("--set", metavar="NAME=VALUE", action="append", default=UNSET, help=names)

    def read_flags(self, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """Return the given flags, after checking them. Raises UsageError."""
        given = [word.partition("=")[0] for word in (sys.argv[1:] if arguments is None else arguments)]
        for name, about in declared(*self._config_classes).items():
            if about.is_single and given.count(flag(name)) > 1:
                raise UsageError(f"{flag(name)} is given twice, but only one can have an effect; leave the others out")
        found, unknown = self.parse_known_intermixed_args(arguments)
        if unknown:
            flags = [text for action in self._actions for text in action.option_strings]
            wrong = [text.partition("=")[0] for text in unknown if text.startswith("--")]
            if wrong and (
                rare := [name for name in self._without_flag if wrong[0] in (flag(name), flag(f"no_{name}"))]
            ):
                self.error(f"{wrong[0]} is no flag; use --set {rare[0]}=VALUE, or a settings file")
            meant = did_you_mean(wrong[0], flags) if wrong else ""
            if wrong and not meant and "set" in declared(*self._config_classes):
                meant = "; change a workload's setting by --set NAME=VALUE"
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        values = vars(found)
        if self._without_flag:
            values |= dict(map(self._setting_of, values.pop("set", ())))
        checked(values, *self._config_classes)
        return values

    def _setting_of(self, text: str) -> tuple[str, Any]:
        name, value = setting_in(text)
        if name not in self._without_flag:
            meant = did_you_mean(name, self._without_flag)
            raise UsageError(f"--set {name}: there is no such setting without a flag{meant}")
        is_one_of_several = self._without_flag[name].plain is tuple and not isinstance(value, list)
        return name, [text.partition("=")[2]] if is_one_of_several else value

    def format_help(self) -> str:
        """Return the help; its usage names only what is no flag."""
        words = []
        for action in self._actions:
            if not action.option_strings:
                may_lack = getattr(action, "save_nargs", action.nargs)  # argparse parses in two steps
                words.append(f"[{action.metavar}]" if may_lack else str(action.metavar))
        self.usage = " ".join(["%(prog)s", *words, "[FLAGS]"])
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Print one line, not the whole usage, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {redact(message)}; see --help\n")


def setting_in(text: str) -> tuple[str, Any]:
    """Return the name and the value of ``NAME=VALUE``; lists and ``true`` are written as in JSON. Raises UsageError."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text} must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):  # no JSON
        return name, value


def peek(*config_classes: type) -> dict[str, Any]:
    """Return the flags of some classes as text, before all flags are known."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--set", action="append", default=UNSET)
    for name, about in declared(*config_classes).items():
        if about.has_flag:
            form = {key: value for key, value in about.form.items() if key in ("action", "nargs", "const")}
            parser.add_argument(flag(name), default=UNSET, **form)
    try:
        values = vars(parser.parse_known_args()[0])
    except argparse.ArgumentError:  # reported when all flags are read
        return {}
    values.pop("set", None)
    return values
