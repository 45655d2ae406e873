"""Whose memory an array shows: its own, a mapped file's, or that of overlapping rows, such as windows."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def map_arrays(function: Callable[[np.ndarray], Any], values: Any) -> Any:
    """Apply a function to an array, or to each array of a dict."""
    if isinstance(values, Mapping):
        return {name: function(array) for name, array in values.items()}
    return function(values)


def owner_of(array: np.ndarray) -> Any:
    """Return what owns the memory that an array shows: an array, a mapped file, or an object without ``base``."""
    owner: Any = array
    while not isinstance(owner, np.memmap) and getattr(owner, "base", None) is not None:
        owner = owner.base
    return owner


def span_of(array: np.ndarray) -> int:
    """Return how many bytes of memory an array shows; fewer than ``nbytes`` if its elements overlap."""
    steps = zip(array.shape, array.strides, strict=True)
    return array.itemsize + sum((size - 1) * abs(stride) for size, stride in steps) if array.size else 0


def may_be_copied(array: np.ndarray) -> bool:
    """Return whether a copy of an array is no larger than its memory, which is this process's own."""
    return not isinstance(owner_of(array), (np.memmap, mmap.mmap)) and array.nbytes <= span_of(array)
