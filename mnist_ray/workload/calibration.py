"""Whether a classifier is as often right as it is sure (https://arxiv.org/abs/1706.04599)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_NUM_BINS = 15  # as in that paper


class Bin(NamedTuple):
    """The predictions whose probability lies in one of the intervals of equal width between 0 and 1."""

    number: int  # of predictions, at least one
    confidence: float  # their mean probability
    accuracy: float  # the fraction of them that is right


def bins_of(probabilities: np.ndarray, are_right: np.ndarray) -> list[Bin]:
    """Return the bins that have predictions, from unsure to sure; of each prediction, its probability, (N,)."""
    numbers = np.minimum((probabilities * _NUM_BINS).astype(int), _NUM_BINS - 1)
    counts, sure, right = (
        np.bincount(numbers, weights, _NUM_BINS) for weights in (np.ones(len(numbers)), probabilities, are_right)
    )
    return [
        Bin(int(n), p / n, r / n) for n, p, r in zip(counts.tolist(), sure.tolist(), right.tolist(), strict=True) if n
    ]


def calibration_error(bins: list[Bin]) -> float:
    """Return the expected calibration error: the mean distance of confidence and accuracy, over all predictions."""
    distances = [part.number * abs(part.accuracy - part.confidence) for part in bins]
    return sum(distances) / sum(part.number for part in bins)
