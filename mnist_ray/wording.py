"""How numbers and settings are said to people."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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
