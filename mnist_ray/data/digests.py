"""Digests of a workload's data: a resumed run recognizes its data by them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided

from mnist_ray.data.data import Arrays, Split, Splits, owner_of, span_of

_MAX_STATS = 1000  # of files, evenly spaced: file servers may be slow


def digests_of(splits: Splits) -> dict[str, str | None]:
    """Return digests of the splits and of the data's ``files``; None for a ``Dataset`` whose files are unknown.

    Arrays in memory are hashed by content, other data by their files.
    """
    named = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    named |= {f"validation {split.name}": split for split in splits.others}
    digests = {name: _digest_of(split) for name, split in named.items()}
    if (weights := splits.train.weights) is not None:
        digests["weights"] = hashlib.sha256(weights.tobytes()).hexdigest()
    if not splits.files:
        return digests
    known = {name: digest for name, digest in digests.items() if digest is not None}
    return {**known, "files": digest_of_files(splits.files)}


def _digest_of(split: Split) -> str | None:
    examples = split.examples
    try:
        if isinstance(examples, Arrays):
            return _digest_of_arrays(examples)
        if (identity := getattr(examples, "identity", None)) is not None:  # of Blocks and of Hugging Face
            return hashlib.sha256(identity.encode()).hexdigest()
        return digest_of_files([path for path, _ in examples.samples])  # torchvision's folders: pairs (file, class)
    except (AttributeError, TypeError, ValueError, OSError):
        return None


def _digest_of_arrays(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for array in arrays.named.values():
        if isinstance(owner := owner_of(array), np.memmap):
            digest.update(digest_of_files([str(owner.filename)]).encode())
        elif span_of(array) < array.nbytes:  # rows overlap: a copy would be much larger than their memory
            digest.update(f"{array.shape} {array.strides}".encode())
            digest.update(_memory_of(array).data)
        else:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _memory_of(array: np.ndarray) -> np.ndarray:
    """Return the memory behind an array with overlapping rows, from its lowest address on, as one dimension."""
    array = array[tuple(slice(None, None, -1 if stride < 0 else 1) for stride in array.strides)]
    return as_strided(array, [span_of(array) // array.itemsize], [array.itemsize])


def digest_of_files(paths: Iterable[str | Path]) -> str:
    """Return a digest of files' names, and of the sizes and times of some. Raises OSError if one is missing."""
    files = [os.fspath(path) for path in paths]
    folder = os.path.commonpath(map(os.path.dirname, files)) if files else ""
    digest = hashlib.sha256("\n".join(file[len(folder) :] for file in files).encode())
    for index in np.linspace(0, len(files) - 1, min(_MAX_STATS, len(files)), dtype=int):
        stat = os.stat(files[index])
        digest.update(f"{stat.st_size} {int(stat.st_mtime)} ".encode())
    return digest.hexdigest()
