"""Curves of training and bars of seconds: each function returns the bytes of a PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes

from mnist_ray.workload.base import Metric
from mnist_ray.workload.figures import new_figure, png_of

_LEAST_ERROR = 0.01  # percent: what stands for none on a logarithmic axis
_LINEAR_ABOVE = 10.0  # percent of mistakes: where the best has more, there are no tenths to be told apart


@dataclass(frozen=True)
class Curve:
    """One line of a plot; points where it is NaN are left out."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    style: Mapping[str, Any]


def curves_of(metric: Metric, curves: Sequence[Curve], steps_per_epoch: float | None) -> bytes:
    """Draw a metric over steps, with epochs along the top; over epochs alone where ``steps_per_epoch`` is None.

    The axis of a loss is logarithmic, and that of a fraction is so in what it lacks to 1, where that is little: good
    ones, which differ by tenths of a percent, can be told apart.
    """
    figure, axes = new_figure(3.4)
    _draw(axes, [Curve(c.label, c.steps, [placed(metric, v) for v in c.values], c.style) for c in curves])
    axes.set_xlabel("step" if steps_per_epoch else "epoch")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    if steps_per_epoch:
        scale = steps_per_epoch
        epochs = axes.secondary_xaxis("top", functions=(_times(1 / scale), _times(scale)))
        epochs.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
        epochs.set_xlabel("epoch")
    scale_axis(axes, metric)
    return png_of(figure)


def _draw(axes: Axes, curves: Sequence[Curve]) -> None:
    for curve in curves:
        points = [point for point in zip(curve.steps, curve.values, strict=True) if math.isfinite(point[1])]
        if points:
            axes.plot(*zip(*points, strict=True), label=curve.label, **curve.style)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda value: value * factor


def placed(metric: Metric, value: float) -> float:
    """Return where a value is drawn on a metric's axis: of a fraction, the percentage that it lacks to 1."""
    return max(100 * (1 - value), _LEAST_ERROR) if metric.is_fraction else value


def scale_axis(axes: Axes, metric: Metric, name: str = "") -> None:
    """Make a vertical axis that of a metric."""
    axes.set_ylabel((name or metric.name) + (" (%)" if metric.is_fraction else ""))
    if metric.is_fraction:
        shown = ticker.FuncFormatter(lambda error, _: f"{100 - error:g}" if error > _LEAST_ERROR else "100")
        errors = [error for line in axes.lines for error in np.asarray(line.get_ydata(), float) if np.isfinite(error)]
        is_linear = min(errors, default=100.0) > _LINEAR_ABOVE
        axes.set_yscale("linear" if is_linear else "log")
        axes.invert_yaxis()
        axes.yaxis.set_major_formatter(shown)
        if is_linear:
            return
    elif metric.name == "loss" and all(np.min(np.asarray(line.get_ydata())) > 0 for line in axes.lines):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    else:
        return
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def seconds(parts: Mapping[str, float]) -> bytes:
    """Draw where the seconds went, a bar each."""
    figure, axes = new_figure(0.8 + 0.35 * len(parts))
    bars = axes.barh(list(parts), list(parts.values()), color="C0")
    axes.bar_label(bars, [f"{value:.1f} s" for value in parts.values()], fontsize="small", padding=2)
    axes.set_xlim(0, 1.2 * (max(parts.values(), default=0.0) or 1.0))
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    return png_of(figure)
