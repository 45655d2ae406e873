"""Folds of a cross-validation, and groups of examples that are held out together."""

from __future__ import annotations

import heapq

import numpy as np

from mnist_ray.data.order import Shuffled
from mnist_ray.errors import UsageError
from mnist_ray.text import count

_FOLD_SEED = 53


def folds_of_examples(size: int, num_folds: int, seed: int, strata: np.ndarray | None) -> np.ndarray:
    """Return the fold of each of ``size`` examples, (size,), from 0 on, decided by ``seed``.

    The folds' sizes differ by at most one, and so do their numbers of examples with each value of ``strata``, (size,).
    Raises UsageError if there are too few examples.
    """
    if size < num_folds:
        raise UsageError(f"--folds {num_folds} is more than the {count(size, 'training example')}")
    shuffled = Shuffled(size, [seed, _FOLD_SEED])[:]
    if strata is not None:
        shuffled = shuffled[np.argsort(strata[shuffled], kind="stable")]
    folds = np.empty(size, int)
    folds[shuffled] = np.arange(size) % num_folds
    return folds


def folds_of_groups(sizes: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """Return the fold of each group, (groups,), from 0 on, decided by ``seed``; ``sizes``: their examples.

    The largest groups come first, each in the smallest fold so far. Raises UsageError if there are too few groups.
    """
    if len(sizes) < num_folds:
        raise UsageError(f"--folds {num_folds} is more than the {count(len(sizes), 'group')} of training examples")
    shuffled = Shuffled(len(sizes), [seed, _FOLD_SEED])[:]
    smallest, folds = [(0, fold) for fold in range(num_folds)], np.empty(len(sizes), int)
    for group in shuffled[np.argsort(-sizes[shuffled], kind="stable")].tolist():
        total, fold = heapq.heappop(smallest)
        heapq.heappush(smallest, (total + int(sizes[group]), fold))
        folds[group] = fold
    return folds


def random_groups(sizes: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Return whether each group is chosen, (groups,): at random, groups of at most ``size`` examples in all.

    A group that does not fit is passed over; if none fits, the smallest is chosen.
    """
    chosen, num_left = list[int](), size
    for group in Shuffled(len(sizes), [seed])[:].tolist():
        if sizes[group] <= num_left:
            chosen.append(group)
            num_left -= int(sizes[group])
    return np.isin(np.arange(len(sizes)), chosen or [sizes.argmin()])
