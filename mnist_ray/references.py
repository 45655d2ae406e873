"""References to code with arguments: ``a.py:Freeze(epochs=2)``, or ``{"a.py:Freeze": {"epochs": 2}}`` in Python."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnist_ray.errors import UsageError

_CALL = re.compile(r"(.*?\.py(?::\w+)?|[\w.]+(?::\w+)?)\((.*)\)", re.DOTALL)  # a folder may have parentheses, too


def references_of(value: Any) -> tuple[str, ...]:
    """Return references from one, from a list, or from a mapping to keyword arguments. Raises TypeError, UsageError."""
    if isinstance(value, Mapping):
        calls = {name: ", ".join(f"{key}={one!r}" for key, one in {**given}.items()) for name, given in value.items()}
        value = [f"{name}({words})" if words else name for name, words in calls.items()]
    references = [] if value is None else [value] if isinstance(value, (str, Path)) else [*value]
    for reference in references:
        split_call(reference)
    return tuple(map(str, references))


def split_call(reference: str | Path) -> tuple[str, dict[str, Any]]:
    """Return a reference without its keyword arguments, and these. Raises UsageError if they are wrong."""
    if not (found := _CALL.fullmatch(os.fspath(reference))):
        return str(reference), {}
    try:
        call: Any = ast.parse(f"f({found[2]})", mode="eval").body
        if call.args or None in (words := {word.arg: ast.literal_eval(word.value) for word in call.keywords}):
            raise ValueError
    except (SyntaxError, ValueError, AttributeError) as error:
        reason = "arguments must be NAME=VALUE, and values numbers, strings, lists or dicts"
        raise UsageError(f"{os.fspath(reference):.60}: {reason}") from error
    return found[1], words
