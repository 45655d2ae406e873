"""What differs between two records of settings, data, code and machine, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_MAX_NAMES, _MAX_PAIRS = 3, 5  # of files, and of packages or settings, in a line
Difference = str | None
"""What differs: empty if nothing does, None if there is no record to compare with."""
THEN_AND_NOW = ("then", "now")


def lines_of(found: Mapping[str, Difference], why_unknown: str) -> list[tuple[str, str]]:
    """Return a line for each difference, one for all that is the same, and one for all that is unknown, with labels."""
    lines = [("differs", f"{name}: {difference}") for name, difference in found.items() if difference]
    if same := [name for name, difference in found.items() if difference == ""]:
        lines.append(("same", ", ".join(same)))
    if unknown := [name for name, difference in found.items() if difference is None]:
        lines.append(("unknown", f"{', '.join(unknown)}: {why_unknown}"))
    return lines


def pairs_differ(first: Mapping[str, Any], second: Mapping[str, Any], *, words: Sequence[str] = THEN_AND_NOW) -> str:
    """Return which values differ, with both of each; ``words`` say which is which."""
    names = [name for name in {**second, **first} if first.get(name) != second.get(name)]
    differing = [f"{name} {both(first.get(name), second.get(name), words)}" for name in names]
    number = f"{len(names):,}: " if len(names) > _MAX_PAIRS else ""
    return number + first_of(differing, _MAX_PAIRS)


def first_of(names: Sequence[str], number: int = _MAX_NAMES) -> str:
    """Return the first names, and whether there are more."""
    return ", ".join(names[:number]) + (", …" if len(names) > number else "")


def both(first: object, second: object, words: Sequence[str] = THEN_AND_NOW) -> str:
    """Return two values with what each is; a missing one is ``none``."""
    values = ["none" if value in (None, "") else value for value in (first, second)]
    return ", ".join(f"{value} {word}" for value, word in zip(values, words, strict=True))


def as_dict(value: object) -> Mapping[str, Any]:
    """Return a value of a JSON file if it is an object, else an empty one: an older version, or a person, wrote it."""
    return value if isinstance(value, dict) else {}
