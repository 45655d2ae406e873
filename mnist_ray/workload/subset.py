"""Less data, to try things out or to see whether a model learns at all: ``--limit`` and ``--overfit-batches``."""

from __future__ import annotations

import dataclasses

import numpy as np

from mnist_ray.config import TrainConfig
from mnist_ray.errors import count
from mnist_ray.workload.data import Split, Splits
from mnist_ray.workload.order import Shuffled

_SEED = 41
_LEARNED = 0.1  # of the loss before


def subset(splits: Splits, config: TrainConfig) -> Splits:
    """Return what ``--limit`` and ``--overfit-batches`` leave of the data; the same for every run and seed."""
    if config.limit < 1:
        shown = f"{config.limit:.3g} of {splits.name}"
        train, validation, test = (
            _some(split, config.limit) for split in (splits.train, splits.validation, splits.test)
        )
        splits = dataclasses.replace(splits, name=shown, train=train, validation=validation, test=test)
    if config.overfit_batches is None:
        return splits
    size = min(len(splits.train), config.overfit_batches * config.batch_size)
    chosen = np.sort(Shuffled(len(splits.train), [_SEED])[:size])
    few, times = splits.train.take(chosen), max(1, len(splits.train) // size)
    return dataclasses.replace(
        splits,
        name=f"{count(config.overfit_batches, 'batch', 'batches')} of {splits.name}, {count(times, 'time')}",
        train=few.take(np.tile(np.arange(size), times)),
        validation=few.between(0, 0),
        test=few,
    )


def _some(split: Split, limit: float) -> Split:
    size = min(len(split), max(1, round(limit * len(split))))
    return split.take(np.sort(Shuffled(len(split), [_SEED])[:size])) if len(split) else split


def verdict(loss_before: float, loss_after: float) -> str:
    """Return what ``--overfit-batches`` has shown, by the loss of the first step and that on the same examples now."""
    went = f"the loss went from {loss_before:.4g} to {loss_after:.4g}"
    if loss_after <= _LEARNED * loss_before:
        return f"{went}: the model can learn these examples"
    return (
        f"{went}: the model has not learned even these examples; either something is broken (the targets, prepare, the "
        "loss, a layer), or it takes more --num-epochs or another --learning-rate"
    )
