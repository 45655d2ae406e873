"""The two errors that a person reads as one line, and how lines are made: redacted, escaped, with numbers formatted.

Any other exception is a bug and keeps its traceback. Standard library only: it runs before a wrong flag is answered.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

PROGRAM = "mnist-ray"
_PACKAGE = Path(__file__).parent
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # Ray has them in its texts
_IN_ANOTHER_PROCESS = "\nOriginal Traceback "  # in the text of an error of torch's DataLoader
_USER = re.compile(
    r"(?<=:/)(/?)(?:[^\s/]*"  # up to the host …
    r"|[^\s/?#:@]*:(?!\d+(?:[/?#\s]|$))\S*)@"  # … or further: keys for S3 have slashes that should have been escaped
)
_OPTION = re.compile(
    r"([?&#;][\w.-]*(?:secret|token|pass|pwd|key|credential|signature|sig|auth)[\w.-]*=)"
    r"[^&\s]*[^&\s'\")\],;:.]",  # but no mark of the sentence around it
    re.IGNORECASE,
)
_UNPRINTABLE = re.compile(r"[^ -~]")  # or not ASCII: looked at one by one


class UsageError(Exception):
    """What the user asked for cannot be: a wrong flag, value or path. Exit status 2."""


class JobError(Exception):
    """What the user asked for went wrong: bad data, a damaged file, a failed run. Exit status 1."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; its type if it has none."""
    text = _COLOURS.sub("", str(error)).strip() or type(error).__name__
    lines = text.splitlines()
    return lines[-1].partition(": ")[2] if _IN_ANOTHER_PROCESS in text else lines[0]


def with_place(error: BaseException, *folders: Path, or_here: bool = True) -> str:
    """Return an error in one line, with the last place that it came through in the first of ``folders`` with one.

    ``or_here``: if there is none, a place in this package will do.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({Path(error.filename).name}, line {error.lineno})"
    if _IN_ANOTHER_PROCESS in str(error):
        frames = re.findall(r'File "(.+)", line (\d+), in .+', str(error))
    else:
        frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    said = f"{type(error).__name__}: {first_line(error)}"
    for folder in (*folders, _PACKAGE) if or_here else folders:
        for file, line in reversed(frames):
            if folder in Path(file).parents and "site-packages" not in Path(file).parts:
                return f"{said} ({Path(file).name}, line {line})"
    return said


def masked(text: str) -> str:
    """Return a text whose URIs have no user names, passwords and secret options any more."""
    return _OPTION.sub(r"\1***", _USER.sub(r"\1***@", text))


def redact(text: object) -> str:
    """Return a text in one line without secrets, in which what is not printed is written as Python writes it."""
    return _UNPRINTABLE.sub(_escaped, masked(str(text)))


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def say(text: object, file: TextIO | None = None) -> None:
    """Print a line: every text of the jobs goes through here, through ``RunConsole``, or is JSON."""
    print(redact(text), file=file)


def print_whatever_it_is() -> None:
    """Let the standard streams escape what their encoding lacks; if they are closed, what is printed goes nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def count(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, in the plural if it is not one."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def clock_time(seconds: float) -> str:
    """Return a duration as ``M:SS``, or ``H:MM:SS`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_of_hour = divmod(minutes, 60)
    return f"{hours}:{minutes_of_hour:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def in_words(name: str) -> str:
    """Return a setting's name as people say it: ``batch_size`` is ``batch size``."""
    return name.replace("_", " ")


def format_settings(values: Mapping[str, Any]) -> str:
    """Return settings with their values as people read them."""
    return ", ".join(f"{in_words(name)} {format_value(value)}" for name, value in values.items())


def format_value(value: Any) -> str:
    """Return a setting's value as people read it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a clause that names the one of ``known`` that is most like ``name``; nothing if none is."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def command(name: str) -> str:
    """Return how a command is called, as the running one was: by the installed program, or from a checkout."""
    return f"{PROGRAM} {name}" if Path(sys.argv[0]).name.startswith(PROGRAM) else f"python jobs/{name}.py"
