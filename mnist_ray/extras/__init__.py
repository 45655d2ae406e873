"""What Ray's private API adds: faster starts and earlier detection of failures. Everything else uses the public API.

An extra is on if Ray is at least the first version that passed its tests, and has the names that the extra's module
imports. ``--plain-ray`` turns all extras off. ``load`` is the only way to an extra: it returns the extra's module of
this package, or None if the extra is off. Forked workers have no module here: ``ray_fork`` starts them, or lets Ray
start them as usual.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mnist_ray.ray_versions import is_at_least, ray_version


@dataclass(frozen=True)
class Extra:
    """Something that Ray's private API makes possible."""

    gain: str
    since: str  # the first version of Ray with which its tests passed
    has_module: bool = True
    is_of_train: bool = False  # needs Ray Train, which takes seconds to import


EXTRAS = {
    "workers": Extra("forked workers", "2.51", has_module=False),
    "small": Extra("a small local Ray", "2.55"),
    "processes": Extra("a watch over Ray's processes", "2.55"),
    "address": Extra("a quick look at a cluster's address", "2.60"),
    "trainer": Extra("a trainer without unneeded actors", "2.55", is_of_train=True),
    "sweeps": Extra("sweeps that lose no CPUs", "2.51", is_of_train=True),
}


def load(name: str, *, plain: bool) -> ModuleType | None:
    """Return the module of an extra; None if the extra is off. With ``plain``, all are."""
    return importlib.import_module(f"{__name__}.{name}") if is_on(name, plain=plain) else None


def is_on(name: str, *, plain: bool) -> bool:
    """Return whether an extra is on; with ``plain``, none is."""
    return not plain and works(name)


@functools.cache
def works(name: str) -> bool:
    """Return whether this Ray is new enough for an extra, and has the names that its module imports."""
    extra = EXTRAS[name]
    if not is_at_least(extra.since):
        return False
    try:
        if extra.has_module:
            importlib.import_module(f"{__name__}.{name}")
    except (ImportError, AttributeError):
        return False
    return True


def note() -> str:
    """Return one line about the extras that do not work with this Ray; empty if all work.

    Until Ray Train is imported, this leaves out the extras that need it.
    """
    known = [name for name, extra in EXTRAS.items() if "ray.train" in sys.modules or not extra.is_of_train]
    missing = [EXTRAS[name].gain for name in known if not works(name)]
    return f"Ray {ray_version()}: without {', '.join(missing)}" if missing else ""


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Inside the block, give an attribute of ``owner`` another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
