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

_PACKAGE = Path(__file__).parent
_ESCAPE_CODES = re.compile(r"\x1b\[[0-9;]*m")  # colours, which Ray has in its texts
_IN_ANOTHER_PROCESS = "\nOriginal Traceback "  # by which torch's DataLoader tells of an error in one of its processes


class UsageError(Exception):
    """What the user asked for cannot be: a wrong flag, value or path. Exit status 2."""


class JobError(Exception):
    """What the user asked for went wrong: bad data, a damaged file, a failed run. Exit status 1."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; its type where it has none."""
    text = _ESCAPE_CODES.sub("", str(error)).strip() or type(error).__name__
    if _IN_ANOTHER_PROCESS in text:
        return text.splitlines()[-1].partition(": ")[2]
    return text.splitlines()[0]


def with_place(error: BaseException, *folders: Path, or_here: bool = True) -> str:
    """Return an error in one line, with the last place that it came through in the first of ``folders`` with one.

    ``or_here`` tells whether a place in this package will do where there is none.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({Path(error.filename).name}, line {error.lineno})"
    said, frames = f"{type(error).__name__}: {first_line(error)}", traceback.extract_tb(error.__traceback__)
    if _IN_ANOTHER_PROCESS in str(error):
        found_in_text = re.findall(r'File "(.+)", line (\d+), in (.+)', str(error))
        frames = traceback.StackSummary.from_list([(file, int(line), name, None) for file, line, name in found_in_text])
    places = [*(_in(folder, frames) for folder in folders), _in(_PACKAGE, frames) if or_here else []]
    place = next((f" ({Path(found[-1].filename).name}, line {found[-1].lineno})" for found in places if found), "")
    return said + place


def _in(folder: Path, frames: traceback.StackSummary) -> list[traceback.FrameSummary]:
    """Return the frames of files in a folder, but not of packages installed below it."""
    return [f for f in frames if folder in Path(f.filename).parents and "site-packages" not in Path(f.filename).parts]


MASK = "***"
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


def masked(text: str) -> str:
    """Return a text whose URIs have no user information and no secret options any more."""
    return _OPTION.sub(rf"\1{MASK}", _USER.sub(rf"\1{MASK}@", text))


def redact(text: object) -> str:
    """Return a text in one line without secrets, in which what is not printed is written as Python writes it."""
    return _UNPRINTABLE.sub(_escaped, masked(str(text)))


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def say(text: object, file: TextIO | None = None) -> None:
    """Print a line: every text of the jobs goes through here, through ``RunConsole``, or is JSON."""
    print(redact(text), file=file)


def without_user(uri: str) -> str:
    """Return a masked URI; of those for which variables can take its place, without the user information."""
    uri = masked(uri)
    return uri.replace(f"://{MASK}@", "://", 1) if uri.startswith(("s3:", "http:", "https:")) else uri


def print_whatever_it_is() -> None:
    """Let the standard streams write what their encoding lacks as escapes, and nowhere where they are closed."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


PROGRAM = "mnist-ray"


def count(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, in the plural where it is one."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def clock_time(seconds: float) -> str:
    """Return a duration as ``M:SS``, or ``H:MM:SS`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


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
    """Return a clause that names the one of ``known`` that is most like ``name``; nothing where none is."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def command(name: str) -> str:
    """Return how a command is called, as the running one was: by the installed program, or from a checkout."""
    return f"{PROGRAM} {name}" if Path(sys.argv[0]).name.startswith(PROGRAM) else f"python jobs/{name}.py"
