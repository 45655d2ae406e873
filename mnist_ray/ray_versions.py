"""The Ray versions that introduced features of the public API. The minimum is 2.51, where Train V2 is the default."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any


@functools.cache
def ray_version() -> str:
    """Return Ray's version; importing Ray or ``importlib.metadata`` would delay the first line of output."""
    package = importlib.util.find_spec("ray")
    assert package is not None
    assert package.origin is not None
    found = re.search(r'version = "(.+)"', Path(package.origin).with_name("_version.py").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def is_at_least(minimum: str) -> bool:
    """Return whether Ray's version is ``minimum``, such as ``2.55``, or later."""
    own, least = ([int(number) for number in re.findall(r"\d+", text)[:2]] for text in (ray_version(), minimum))
    return own >= least


def must_ask_for_tokens() -> bool:
    """Return whether a local Ray requires a token from every client only if RAY_AUTH_MODE=token."""
    return is_at_least("2.52") and not is_at_least("2.60")


def preemption_info() -> Any:
    """In a worker, return what Ray knows about a preemption of the workers' nodes; None if there is none."""
    import ray.train

    return ray.train.get_preemption_info() if is_at_least("2.60") else None
