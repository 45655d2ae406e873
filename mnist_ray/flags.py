"""Flags made from the settings: one typed field each, checked in one line."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from mnist_ray.errors import did_you_mean, redact
from mnist_ray.settings import build, flag, item_type, value_type

UNSET = argparse.SUPPRESS  # the default of a flag that leaves nothing behind if it is not given


class Parser(argparse.ArgumentParser):
    """An argument parser whose flags come from settings classes and whose errors are one line."""

    def __init__(self, description: str, *config_classes: type, defaults: Mapping[str, Any] | None = None) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self._config_classes = config_classes
        for config_class in config_classes:
            self._add_settings(config_class, defaults or {})

    def _add_settings(self, config_class: type, defaults: Mapping[str, Any]) -> None:
        """Add a flag for each setting; ``defaults`` are shown in place of the settings' own."""
        group = self.add_argument_group((config_class.__doc__ or "").split(":")[0].strip().rstrip("."))
        hints = get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            plain, choices = value_type(hints[field.name])
            kind: dict[str, Any] = {"type": plain, "choices": choices}
            if plain is bool:
                kind = {"action": argparse.BooleanOptionalAction if field.default else "store_true"}
            elif plain is tuple:
                kind = {"type": item_type(hints[field.name]), "nargs": "+", "action": "extend"}
            elif plain is Path:
                kind = {"type": str}  # an empty one would become the current folder
            help_text = field.metadata.get("help", "")
            default = defaults.get(field.name, field.default)
            if plain is not bool and default is not None:
                shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
                help_text += f" (default: {shown})"
            group.add_argument(flag(field.name), default=UNSET, help=help_text.replace("%", "%%"), **kind)

    def read_flags(self, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """Return the flags that were given, checked one by one. Raises UsageError."""
        found, unknown = self.parse_known_intermixed_args(arguments)
        if unknown:
            flags = [text for action in self._actions for text in action.option_strings]
            wrong = [text.partition("=")[0] for text in unknown if text.startswith("--")]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(wrong[0], flags) if wrong else ''}")
        for config_class in self._config_classes:
            build(config_class, vars(found))
        return vars(found)

    def error(self, message: str) -> NoReturn:
        """Print one line, not the whole usage, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {redact(message)}; see --help\n")


def peek(*names: str) -> tuple[dict[str, Any], str | None]:
    """Return those of some flags that the command line gives, and the word that is no flag, before all are known.

    That is a run's or a checkpoint's name. The word after a flag that is not known yet may be its value, so any other
    word goes before it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        parser.add_argument(flag(name), default=UNSET, action="store_true" if name == "resume" else "store")
    try:
        found, rest = parser.parse_known_args()
    except argparse.ArgumentError:  # said when all flags are read
        return {}, None
    pairs = [(before, word) for before, word in itertools.pairwise(["", *rest]) if not word.startswith("-")]
    pairs.sort(key=lambda pair: pair[0].startswith("-") and "=" not in pair[0])
    return vars(found), next((word for _, word in pairs), None)
