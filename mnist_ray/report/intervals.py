"""95 % intervals of means and of differences, and the exact McNemar test."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

_LEVEL = 0.95
_NUM_POINTS = 10_000  # of an integral: quantiles are right to five digits
_WIDEST = 10.0  # of t in standard deviations, if there are many degrees of freedom


@functools.cache
def t_quantile(df: float) -> float:
    """Return t such that 95 % of Student's distribution with ``df`` >= 1 degrees of freedom lie between -t and t.

    For t = sqrt(df) tan(angle), the density over the angle is proportional to cos(angle) ** (df - 1).
    """
    angles = np.linspace(0, min(math.pi / 2, _WIDEST / math.sqrt(df)), _NUM_POINTS + 1)
    shares = np.cumsum(np.cos((angles[1:] + angles[:-1]) / 2) ** (df - 1))
    angle = np.interp(_LEVEL, np.append(0, shares / shares[-1]), angles)
    return math.sqrt(df) * math.tan(angle)


def mean_interval(values: Sequence[float], overlap: float = 0.0) -> tuple[float, float]:
    """Return the 95 % interval of the mean of what ``values`` are drawn from; NaN for fewer than two values.

    ``overlap``: for folds of a cross-validation, whose training sets have examples in common: the number of an
    evaluation's examples divided by those of its training. Source: Nadeau and Bengio, Inference for the Generalization
    Error, Machine Learning 52 (2003).
    """
    number, mean = len(values), float(np.mean(values))
    if number < 2:
        return math.nan, math.nan
    half = t_quantile(number - 1) * math.sqrt((1 / number + overlap) * float(np.var(values, ddof=1)))
    return mean - half, mean + half


def mcnemar(won: int, lost: int) -> float:
    """Return the two-sided p value of McNemar's exact test: how likely so uneven a split is if both sides are even.

    ``won``, ``lost``: the examples that only the second model, or only the first one, has right.
    """
    number, fewer = won + lost, min(won, lost)
    whole = math.lgamma(number + 1) - number * math.log(2)
    logs = (whole - math.lgamma(k + 1) - math.lgamma(number - k + 1) for k in range(fewer + 1))
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def seeds_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the difference of means, second minus first, for other seeds and other examples.

    Both have a row per seed, at least two, and a column per example; the examples are the same. To Welch's variance of
    the rows' means comes that of the examples: the variance of their mean differences, without what seeds add to it.
    Source: Gallas et al., A framework for random-effects ROC analysis, Communications in Statistics 38 (2009), where
    readers are what seeds are here, and cases are the examples.
    """
    sides, number = (first, second), first.shape[1]
    differences = second.mean(0) - first.mean(0)
    of_seeds = sum(float(np.var(_without_means(side), axis=0, ddof=1).mean()) / len(side) for side in sides)
    of_examples = max(0.0, float(np.var(differences, ddof=1)) - of_seeds) / number if number > 1 else 0.0
    parts = [(float(np.var(side.mean(1), ddof=1)) / len(side), len(side) - 1) for side in sides]
    parts.append((of_examples, max(1, number - 1)))
    mean, variance = float(differences.mean()), math.fsum(part for part, _ in parts)
    if variance == 0:
        return mean, mean
    df = variance**2 / math.fsum(part**2 / own_df for part, own_df in parts)  # Welch and Satterthwaite
    half = t_quantile(df) * math.sqrt(variance)
    return mean - half, mean + half


def _without_means(rows: np.ndarray) -> np.ndarray:
    return rows - rows.mean(axis=1, keepdims=True)
