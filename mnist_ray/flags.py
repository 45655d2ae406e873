"""Flags made from the settings: one typed field each, checked in one line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from mnist_ray.errors import did_you_mean, redact
from mnist_ray.settings import build, flag, item_type, parse_text, value_type

UNSET = argparse.SUPPRESS  # the default of a flag that leaves nothing behind where it is not given


class Parser(argparse.ArgumentParser):
    """An argument parser whose flags come from settings classes and whose errors are one line."""

    def __init__(
        self,
        description: str,
        *config_classes: type,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self._config_classes = config_classes
        self._setting_defaults = defaults or {}  # shown in place of the settings' own
        for config_class in config_classes:
            self._add_settings(config_class)

    def _add_settings(self, config_class: type) -> None:
        group = self.add_argument_group((config_class.__doc__ or "").split(":")[0].strip().rstrip("."))
        hints = get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            plain, choices = value_type(hints[field.name])
            kind: dict[str, Any] = {"type": plain, "choices": choices}
            if plain is bool:
                kind = {"action": argparse.BooleanOptionalAction if field.default else "store_true"}
            elif plain is tuple:
                kind = {"type": _item_parser(item_type(hints[field.name])), "nargs": "+", "action": "extend"}
            elif plain is Path:
                kind = {"type": str}  # an empty one would become the current folder
            help_text = field.metadata.get("help", "")
            default = self._setting_defaults.get(field.name, field.default)
            if plain is not bool and default is not None:
                help_text += f" (default: {_default_text(default)})"
            group.add_argument(flag(field.name), default=UNSET, help=help_text.replace("%", "%%"), **kind)

    def read_flags(self, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """Return the flags that were given, checked one by one. Raises UsageError."""
        found, unknown = self.parse_known_intermixed_args(arguments)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        flags = vars(found)
        for config_class in self._config_classes:
            build(config_class, flags)
        return flags

    def _meant(self, unknown: Sequence[str]) -> str:
        """Return which flag the first of some that are not known may stand for."""
        wrong = next((text.partition("=")[0] for text in unknown if text.startswith("--")), None)
        if wrong is None:
            return ""
        flags = [text for action in self._actions for text in action.option_strings if text.startswith("--")]
        return did_you_mean(wrong, flags)

    def error(self, message: str) -> NoReturn:
        """Print one line, not the whole usage, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {redact(message)}; see --help\n")


def _item_parser(kind: type[Any]) -> Callable[[str], Any]:
    """Return what parses one of several values; named after the type, which argparse names in its errors."""

    def parse(text: str) -> Any:
        return parse_text(kind, text)

    parse.__name__ = kind.__name__
    return parse


def _default_text(default: object) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def peek(*names: str) -> dict[str, Any]:
    """Return those of some flags that the command line gives, before all flags are known."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        if name == "resume":
            parser.add_argument("--resume", action="store_true", default=UNSET)
        else:
            parser.add_argument(flag(name), default=UNSET)
    with contextlib.suppress(argparse.ArgumentError):  # said when all flags are read
        return vars(parser.parse_known_args()[0])
    return {}


def peek_word(*names: str) -> str | None:
    """Return the word of the command line that is no flag, before all flags are known: a run's or a checkpoint's name.

    ``names`` are settings whose flags take a value. The word after another flag may be that flag's value, so any other
    word goes before it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        parser.add_argument(flag(name))
    rest = parser.parse_known_args()[1]
    pairs = [(before, word) for before, word in itertools.pairwise(["", *rest]) if not word.startswith("-")]
    words = sorted(pairs, key=lambda pair: pair[0].startswith("-") and "=" not in pair[0])
    return words[0][1] if words else None
