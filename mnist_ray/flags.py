"""The flags of a command, made from its settings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mnist_ray import layers
from mnist_ray.errors import UsageError
from mnist_ray.settings import Given, Setting, declared, flag
from mnist_ray.storage import locate
from mnist_ray.text import did_you_mean, redact

UNSET = argparse.SUPPRESS  # a flag that is not given leaves no value
_WORDS: dict[type, str] = {int: "N", float: "X", str: "TEXT", Path: "PATH"}  # for a flag's value in the help


class Parser(argparse.ArgumentParser):
    """An argument parser with a flag for each setting of some classes. It reports errors in one line.

    ``--help`` shows ``defaults`` instead of the settings' own, and first the flags of ``daily`` use.
    """

    def __init__(
        self,
        description: str,
        *classes: type,
        defaults: Given | None = None,
        daily: Collection[str] = (),
        add_help: bool = True,
    ) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter, add_help=add_help)
        self._settings = declared(*classes)
        words = [f"[{one.word}]" if _form_of(one)["nargs"] else one.word for one in self._settings.values() if one.word]
        self.usage = " ".join(["%(prog)s", *words, "[FLAGS]"])
        most_used = self.add_argument_group("Most used")  # argparse prints no title of an empty group
        for config_class in classes:
            group = self.add_argument_group(title_of(config_class))
            for name, about in declared(config_class).items():
                if about.has_flag:
                    shown = name if about.word else flag(name)
                    help_text = _help_with(about, (defaults or {}).get(name, about.default)).replace("%", "%%")
                    of_flag = most_used if name in daily else group
                    of_flag.add_argument(shown, default=UNSET, help=help_text, **_form_of(about))
        rare = [name for name, about in self._settings.items() if not about.has_flag]
        if "set" not in self._settings:
            set_help = f"set a setting by its name; these have no flag: {', '.join(rare)}" if rare else UNSET
            self.add_argument("--set", metavar="NAME=VALUE", action="append", default=UNSET, help=set_help)

    def read_flags(self, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """Return the given flags, whose values are not yet checked. Exits after one line if a flag is unknown."""
        values, unknown = self.read_known(arguments)
        if unknown:
            self.error(self._explained(unknown))
        return values

    def read_known(self, arguments: Sequence[str] | None = None) -> tuple[dict[str, Any], list[str]]:
        """Return the given flags that this parser knows, and the other words. Raises UsageError."""
        found, unknown = self.parse_known_intermixed_args(arguments)
        known = self._settings
        values = {name: known[name].parsed(value) if name in known else value for name, value in vars(found).items()}
        for text in () if "set" in known else values.pop("set", ()):
            name, value = setting_in(text)
            if name in known:
                values[name] = value
            else:
                unknown.append(f"--set {text}")
        return values, unknown

    def _explained(self, unknown: Sequence[str]) -> str:
        """Return why words are not known, and what may be meant."""
        found = f"unrecognized arguments: {' '.join(unknown)}"
        wrong = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
        for name, about in self._settings.items():
            if not about.has_flag and wrong in (flag(name), flag(f"no_{name}")):
                return f"{wrong} is no flag; use --set {name}=VALUE, or a settings file"
        meant = did_you_mean(wrong, [*self._option_string_actions, *(f"--set {name}" for name in self._settings)])
        return found + (meant or "; change a workload's setting by --set NAME=VALUE" * ("set" in self._settings))

    def error(self, message: str) -> NoReturn:
        """Print one line, not the whole usage, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {redact(message)}; see --help\n")


def setting_in(text: str, given_as: str = "--set") -> tuple[str, Any]:
    """Return the name and the value of ``NAME=VALUE``; lists and ``true`` are written as in JSON. Raises UsageError."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"{given_as} {text} must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):  # no JSON
        return name, value


def peek(*config_classes: type) -> dict[str, Any]:
    """Return the flags of some classes, not yet checked, before all flags are known. Raises UsageError."""
    return Parser("", *config_classes, add_help=False).read_known()[0]


def complete(flags: Mapping[str, Parser]) -> None:
    """Tell the shell what may come next on its command line, and exit. ``flags``: those of each command."""
    import argcomplete  # of the extra "completion"

    def values(prefix: str, action: argparse.Action, parsed_args: argparse.Namespace, **asked: Any) -> list[str]:
        if action.dest in ("run", "run_name", "first", "second"):
            storage_path = layers.storage_path(getattr(parsed_args, "storage_path", None))
            return locate(storage_path, "").subfolders()
        if str(action.metavar).startswith("{"):
            return str(action.metavar).strip("{}").split(",")
        return list(argcomplete.FilesCompleter()(prefix))

    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for name, flags_of_command in flags.items():
        commands.add_parser(name, parents=[flags_of_command])
    argcomplete.autocomplete(parser, default_completer=values)


def title_of(config_class: type) -> str:
    """Return the title of a class of settings: its docstring up to a colon."""
    title = (config_class.__doc__ or "").split(":")[0].strip().rstrip(".")
    # A dataclass without a docstring gets one from Python, such as "Settings(width: int = 32)".
    return "The workload's settings" if "(" in title else title


def _form_of(about: Setting) -> dict[str, Any]:
    """Return a flag's arguments for ``add_argument``; its values stay texts, for ``Setting.parsed``."""
    is_list = about.plain is tuple
    if about.plain is bool:
        return {"action": "store_true" if about.name.startswith("no_") else argparse.BooleanOptionalAction}
    if about.word:
        for_one = "?" if about.may_be_none else None
        return {"metavar": about.word, "nargs": "*" if is_list else for_one}
    if is_list:
        several = {"action": "append"} if about.is_repeated else {"action": "extend", "nargs": "+"}
        return {"metavar": about.metavar or _WORDS[about.item], **several}
    choices = "{" + ",".join(map(str, about.arguments)) + "}" if about.arguments else ""
    form = {"metavar": about.metavar or choices or _WORDS[about.plain]}
    return form if about.bare is None else {**form, "nargs": "?", "const": about.bare}


def _help_with(about: Setting, default: Any) -> str:
    """Return a flag's help with a default, if there is one."""
    default = about.unset if default is None and about.unset != "none" else default
    if about.plain is bool or default in (None, (), ""):
        return about.help
    return f"{about.help} (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
