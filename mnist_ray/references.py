"""References to a user's callbacks and trackers: ``FILE.py:NAME``, with keyword arguments as in a call.

``freeze.py:Freeze(num_epochs=2)`` on the command line and in the files of a run is ``{"freeze.py:Freeze":
{"num_epochs": 2}}`` in Python and in a settings file.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MAX_LETTERS = 4_096  # of a reference; each parenthesis in it is tried as the start of the arguments


def references_of(value: Any) -> tuple[str, ...]:
    """Return references from one, from a list of them, or from a mapping to keyword arguments; none from None.

    Raises TypeError, or ValueError with the reason.
    """
    if isinstance(value, Mapping):
        return tuple(_called(reference, arguments) for reference, arguments in value.items())
    several = [value] if isinstance(value, (str, Path)) else [] if value is None else value
    if not isinstance(several, Sequence) or not all(isinstance(one, (str, Path)) for one in several):
        raise TypeError
    for one in several:
        split_call(str(one))
    return tuple(map(str, several))


def split_call(reference: str) -> tuple[str, dict[str, Any]]:
    """Return a reference without its keyword arguments, and these. Raises ValueError if they are wrong."""
    if len(reference) > _MAX_LETTERS:
        raise ValueError(f"it has {len(reference):,} characters; {_MAX_LETTERS:,} are allowed")
    if not reference.endswith(")"):
        return reference, {}
    for start in (number for number, letter in enumerate(reference) if letter == "("):
        try:
            call = ast.parse(f"f{reference[start:]}", mode="eval").body
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                words = {word.arg or "": ast.literal_eval(word.value) for word in call.keywords}
                if not call.args and "" not in words:
                    return reference[:start], words
        except (SyntaxError, ValueError):  # this parenthesis is a part of the path, or the arguments are wrong
            continue
    raise ValueError("arguments must be NAME=VALUE, and values numbers, strings, lists or dicts")


def _called(reference: Any, arguments: Any) -> str:
    if not isinstance(reference, (str, Path)) or not isinstance(arguments, Mapping):
        raise TypeError
    words = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    text = f"{reference}({words})" if words else str(reference)
    if split_call(text) != (str(reference), {**arguments}):
        raise ValueError("arguments must be numbers, strings, lists or dicts, by name")
    return text
