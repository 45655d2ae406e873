"""The loss on the examples of each source of a ``Mix``."""

from __future__ import annotations

import numpy as np

from mnist_ray.data.data import Sources, Split
from mnist_ray.training.metrics import WEIGHT, Evaluation


def loss_by_source(evaluation: Evaluation, split: Split) -> dict[str, float]:
    """Return the mean loss on the examples of each source of the ``split``, as ``loss.NAME``; {} without sources."""
    if not isinstance(sources := split.draws, Sources):
        return {}
    numbers = sources.numbers_of(split.all_places)
    losses = evaluation.losses["loss"].astype(float)
    weights = evaluation.losses.get(WEIGHT, np.ones_like(losses))
    sums = (np.bincount(numbers, values, len(sources.names)) for values in (losses, weights))
    of_sources = zip(sources.names, *sums, strict=True)
    return {f"loss.{name}": float(loss / weight) for name, loss, weight in of_sources if weight > 0}
