"""Text for people: numbers with units, settings, and what must not be printed."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

PROGRAM, VERSION = "mnist-ray", "0.1.0"
_USER = re.compile(
    r"(?<=:/)(/?)(?:[^\s/]*"  # user:password before the host, …
    r"|[^\s/?#:@]*:(?!\d+(?:[/?#\s]|$))\S*)@"  # … including an S3 key with unescaped slashes
)
_WORD = re.compile(r"\S+")
_OPTION = re.compile(
    r"([?&#;](?=[\w.-]*=[^&\s]*[^&\s'\")\],;:.])"  # a quick look: the rest would fail slowly
    r"[\w.-]*(?:secret|token|pass|pwd|key|credential|signature|sig|auth)[\w.-]*=)"
    r"[^&\s]*[^&\s'\")\],;:.]",  # without the punctuation that follows a value
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """Return a text in which users, passwords and secret options of URIs are replaced by ``***``."""
    return _OPTION.sub(r"\1***", _WORD.sub(_without_user, text))


def _without_user(word: re.Match[str]) -> str:
    before, at, after = word[0].rpartition("@")  # a search beyond the last @ would fail, in quadratic time
    return _USER.sub(r"\1***@", before + at) + after


def redact(text: object) -> str:
    """Return a text as one line that is safe to print: secrets masked, control characters escaped."""
    text = masked(str(text))
    if text.isprintable():
        return text
    return escaped(text, str.isprintable)


def escaped(text: str, is_plain: Callable[[str], bool]) -> str:
    """Return a text with escapes, such as ``\\x1b``, for all characters that are not plain."""
    return "".join(letter if is_plain(letter) else letter.encode("unicode_escape").decode("ascii") for letter in text)


def count(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, as in ``2 images``."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def size_of(num_bytes: float) -> str:
    """Return a number of bytes as text."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def clock_time(seconds: float) -> str:
    """Return a duration as ``M:SS``, or ``H:MM:SS`` from an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_of_hour = divmod(minutes, 60)
    return f"{hours}:{minutes_of_hour:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def in_words(name: str) -> str:
    """Return ``batch_size`` as ``batch size``."""
    return name.replace("_", " ")


def format_settings(values: Mapping[str, Any]) -> str:
    """Return settings as text: ``batch size 128, learning rate 0.005``."""
    return ", ".join(f"{in_words(name)} {format_value(value)}" for name, value in values.items())


def format_value(value: Any) -> str:
    """Return a setting's value as text."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean X?`` for the most similar known name; empty if none is similar."""
    cutoff = 0.7 if name.startswith("--") else 0.65  # --train-size and --validation-size are 0.69 alike
    close = difflib.get_close_matches(name, list(known), 1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""


def command(name: str) -> str:
    """Return how to call a command: with the installed program if that is running, else with the command's script."""
    running = Path(sys.argv[0])
    if running.name.startswith(PROGRAM):
        return f"{PROGRAM} {name}"
    folder = os.path.relpath(running.parent) if running.parent.name == "jobs" else "jobs"  # from the current folder
    return f"python {shlex.quote(f'{folder}/{name}.py')}"
