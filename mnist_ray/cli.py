"""The command line of the jobs: flags made from the settings, and exit statuses."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, get_type_hints

from mnist_ray.config import build, flag, value_type
from mnist_ray.environment import take_sigterm_as_interrupt
from mnist_ray.errors import JobError, UsageError

UNSET = argparse.SUPPRESS
"""The default of a flag that leaves nothing behind where it is not given."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose flags come from config classes and whose errors are one line."""

    def __init__(self, description: str, *config_classes: type, without: tuple[str, ...] = ()) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self._config_classes = config_classes
        for config_class in config_classes:
            self._add_settings(config_class, without)

    def _add_settings(self, config_class: type, without: tuple[str, ...]) -> None:
        group = self.add_argument_group((config_class.__doc__ or "").split(":")[0].rstrip("."))
        hints = get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            if field.name in without:
                continue
            plain, choices = value_type(hints[field.name])
            kinds: dict[type, dict[str, Any]] = {
                bool: {"action": "store_true"},
                tuple: {"type": int, "nargs": "+"},
            }
            kind = kinds.get(plain, {"type": plain, "choices": choices})
            if field.name == "num_workers":
                kind = {"type": _worker_range}
            shown = field.metadata["help"]
            if plain is not bool and field.default is not None:
                shown += f" (default: {field.default})"
            group.add_argument(flag(field.name), default=UNSET, help=shown, **kind)

    def read_flags(self) -> dict[str, Any]:
        """Return the flags that were given, checked one by one. Raises UsageError."""
        flags = vars(self.parse_intermixed_args())
        if isinstance(flags.get("num_workers"), tuple):
            flags["min_workers"], flags["num_workers"] = flags["num_workers"]
        elif "num_workers" in flags:  # takes the place of a saved MIN:MAX as a whole
            flags.setdefault("min_workers", None)
        for config_class in self._config_classes:
            build(config_class, flags)
        return flags

    def error(self, message: str) -> NoReturn:
        """Print one line, not the whole usage, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def _worker_range(text: str) -> int | tuple[int, ...]:
    """Parse ``N``, or ``MIN:MAX`` into both."""
    try:
        numbers = tuple(map(int, text.split(":")))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 2):
        raise argparse.ArgumentTypeError(f"must be N or MIN:MAX, not {text!r}")
    return numbers if len(numbers) == 2 else numbers[0]


def run(main: Callable[[], None]) -> NoReturn:
    """Run a job's main and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted; a bug keeps its traceback."""
    take_sigterm_as_interrupt()
    status = _status_of(main)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is written and closed; to take torch and Ray apart would take most of a second


def _status_of(main: Callable[[], None]) -> int:
    try:
        main()
        sys.stdout.flush()
    except (UsageError, JobError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt as interrupt:
        print(_text_of(interrupt), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `… | head`
        return 1
    return 0


def _text_of(interrupt: BaseException) -> str:
    """Return what an interrupt says, or the one before it that a second Ctrl-C has cut short."""
    if not str(interrupt) and isinstance(interrupt.__context__, KeyboardInterrupt):
        return _text_of(interrupt.__context__)
    return str(interrupt) or "interrupted"
