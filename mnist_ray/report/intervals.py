"""95 % intervals of means and of differences, and the exact McNemar test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_LEVEL = 0.95
_NUM_POINTS = 10_000  # of an integral: quantiles are right to five digits
_WIDEST = 10.0  # of t in standard deviations, if there are many degrees of freedom


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
