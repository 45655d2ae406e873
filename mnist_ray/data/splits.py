"""Divides a workload's data into training, validation and test sets, and makes subsets for quick trials."""

from __future__ import annotations

import dataclasses
import heapq
from typing import NamedTuple

import numpy as np

from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Data, Split, Splits
from mnist_ray.data.order import AllBut, Shuffled
from mnist_ray.errors import UsageError
from mnist_ray.text import count

_HOLD_OUT_SEED, _SUBSET_SEED = 28, 41
_MAX_HELD_OUT = 5000  # by default; more examples would only make validation slower


class Fold(NamedTuple):
    """A part of a cross-validation."""

    number: int  # from 0 on
    num_folds: int
    seed: int
    strata: np.ndarray | None  # (N,): each fold has its share of every value


def splits_of(data: Data, validation_size: int | None, fold: Fold | None = None) -> Splits:
    """Return the splits of a workload's data for a run; with a ``fold``, the test set is this part of ``Data.train``.

    Raises UsageError if ``validation_size`` or the fold does not fit.
    """
    splits = _divided(data, validation_size, fold)
    train = splits.train.transformed(data.train_transform, data.transform)
    evaluated = (splits.validation, splits.test, *splits.others)
    validation, test, *others = (split.transformed(data.transform) for split in evaluated)
    return dataclasses.replace(splits, train=train, validation=validation, test=test, others=others)


def _divided(data: Data, validation_size: int | None, fold: Fold | None) -> Splits:
    splits = _held_out(data, validation_size, fold)
    if data.test is None and fold is None:
        return dataclasses.replace(splits, test=splits.validation, evaluated="val")
    return splits


def _held_out(data: Data, validation_size: int | None, fold: Fold | None) -> Splits:
    name = data.name if data.weights is None else f"{data.name} (drawn by weight)"
    train = Split(data.train, weights=data.weights, groups=data.groups)
    test = train.take(slice(0)) if data.test is None else Split(data.test, origin="test")
    if fold is not None:
        name = f"fold {fold.number + 1} of {fold.num_folds} of {name}"
        held_out = _positions_of(fold, train)
        train, test = train.take(AllBut(len(train), held_out)), train.take(held_out)
    if train.is_stream and data.validation is None and validation_size is None:
        validation_size = 0
    if validation_size == 0:
        return Splits(name, train, train.take(slice(0)), test, data.files)
    if data.validation is not None and validation_size is None:
        sets = [Split(examples, origin="validation", name=own) for own, examples in data.validation_sets.items()]
        validation, *others = sets
        return Splits(name, train, validation, test, data.files, others=others)
    if train.is_stream:
        raise UsageError("--validation-size: nothing can be held out from a stream", fix="give Data.validation instead")
    size = min(_MAX_HELD_OUT, len(train) // 10) if validation_size is None else validation_size
    if size >= len(train):
        raise UsageError(
            f"--validation-size {size:,} leaves nothing to train on: the data has {len(train):,} training examples"
        )
    # At random, since files may be sorted by label; the same examples for every run and seed, to compare runs.
    held_out = _drawn(train, size, _HOLD_OUT_SEED, are_grouped=True)
    if len(held_out) == len(train):
        kind = "block" if train.is_in_blocks else "group"
        raise UsageError(
            f"all training examples are in one {kind}", fix="set --validation-size 0, or give Data.validation"
        )
    return Splits(name, train.take(AllBut(len(train), held_out)), train.take(held_out), test, data.files)


def _positions_of(fold: Fold, train: Split) -> np.ndarray:
    """Return the sorted positions of a fold's examples. Raises UsageError."""
    if train.is_stream:
        raise UsageError("--folds: nothing can be held out from a stream")
    if (groups := _groups_of(train)) is not None:
        folds = folds_of_groups(np.bincount(groups), fold.num_folds, fold.seed)[groups]
    else:
        folds = folds_of_examples(len(train), fold.num_folds, fold.seed, fold.strata)
    return np.flatnonzero(folds == fold.number)


def _groups_of(split: Split) -> np.ndarray | None:
    """Return the number of each example's group, (N,); None if examples may be held out one by one.

    The examples of a block are a group: a block whose examples were divided would be read by both sides.
    """
    if (sizes := split.block_sizes) is not None:
        return np.repeat(np.arange(len(sizes)), sizes)
    return None if split.groups is None else np.unique(split.groups, return_inverse=True)[1]


def subset(splits: Splits, config: TrainConfig) -> Splits:
    """Apply ``--limit`` and ``--overfit-batches``; the result is the same for every run and seed. Raises UsageError."""
    if splits.train.is_stream and (config.limit < 1 or config.overfit_batches):
        raise UsageError("--limit and --overfit-batches do not work with a stream; yield fewer examples instead")
    if config.limit < 1:
        splits = dataclasses.replace(
            splits,
            name=f"{config.limit:.3g} of {splits.name}",
            train=_part(splits.train, config.limit),
            validation=_part(splits.validation, config.limit),
            test=_part(splits.test, config.limit),
            others=[_part(split, config.limit) for split in splits.others],
        )
    if config.overfit_batches is None:
        return splits
    size = min(len(splits.train), config.overfit_batches * config.batch_size)
    few = splits.train.take(_drawn(splits.train, size, _SUBSET_SEED)[:size])
    times = max(1, len(splits.train) // len(few))
    return dataclasses.replace(
        splits,
        name=f"{count(config.overfit_batches, 'batch', 'batches')} of {splits.name}, {count(times, 'time')}",
        train=few.take(np.tile(np.arange(len(few)), times)),
        validation=few.take(slice(0)),
        test=few.transformed(*splits.test.transforms),
        others=(),
    )


def _part(split: Split, limit: float) -> Split:
    return split.take(_drawn(split, max(1, round(limit * len(split))), _SUBSET_SEED)) if len(split) else split


def _drawn(split: Split, size: int, seed: int, *, are_grouped: bool = False) -> np.ndarray:
    """Return the sorted positions of ``size`` random examples; of data in blocks, or in groups, of whole ones."""
    if (sizes := split.block_sizes) is not None:
        # The first that fit, at least one. (Of groups, one that does not fit is passed over.)
        order = [block for block in Shuffled(len(sizes), [seed])[:].tolist() if sizes[block]]
        number = max(1, int(np.searchsorted(np.cumsum(sizes[order]), size, side="right")))
        return np.flatnonzero(np.repeat(np.isin(np.arange(len(sizes)), order[:number]), sizes))
    if are_grouped and (groups := _groups_of(split)) is not None:
        return np.flatnonzero(random_groups(np.bincount(groups), size, seed)[groups])
    return np.sort(Shuffled(len(split), [seed])[:size])


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
