"""Plots of a run's values: curves over steps, on an axis that fits the metric; and stacked bars."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis

from mnist_ray.workload.drawing import new_plot, plain, png_of
from mnist_ray.workload.figures import Metric

_MIN_ERROR = 0.01  # percent: stands for 0 on a logarithmic axis
_LINEAR_ABOVE = 10.0  # percent of mistakes: the axis is linear if all values are above


@dataclass(frozen=True)
class Curve:
    """One line of a plot; NaNs are left out."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    style: Mapping[str, Any]


def smoothed(curve: Curve, min_steps: float) -> Curve:
    """Join points until each covers at least ``min_steps``; a point is the mean over the steps since the last one."""
    points = [point for point in zip(curve.steps, curve.values, strict=True) if math.isfinite(point[1])]
    ends = [0.0]
    for step, _ in points:
        if step == points[-1][0] or min(step - ends[-1], points[-1][0] - step) >= min_steps:
            ends.append(step)
    steps, values = np.array([(0, 0), *points]).T
    sums = np.interp(ends, steps, np.cumsum(values * np.diff(steps, prepend=0)))
    return replace(curve, steps=ends[1:], values=(np.diff(sums) / np.diff(ends)).tolist())


def curves_of(metric: Metric, curves: Sequence[Curve], steps_per_epoch: float) -> bytes:
    """Draw a metric over steps, with epochs along the top."""
    figure, axes = new_plot("step")
    for curve in curves:
        values = [on_axis(metric, value) for value in curve.values]
        points = [point for point in zip(curve.steps, values, strict=True) if math.isfinite(point[1])]
        if points:
            axes.plot(*zip(*points, strict=True), label=curve.label, **curve.style)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    to_epochs, to_steps = (functools.partial(np.multiply, by) for by in (1 / steps_per_epoch, steps_per_epoch))
    epochs = axes.secondary_xaxis("top", functions=(to_epochs, to_steps))
    epochs.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    epochs.set_xlabel("epoch")
    scale_axis(axes, metric)
    return png_of(figure)


def bands_of(metric: Metric, epochs: Sequence[float], runs: Mapping[str, np.ndarray]) -> bytes:
    """Draw a metric of several runs over epochs: for each label, the mean and a band from the lowest to the highest.

    ``runs``: the values by label, (runs, epochs); NaNs are left out.
    """
    figure, axes = new_plot("epoch")
    for number, (label, values) in enumerate(runs.items()):
        shown = np.array([[on_axis(metric, value) for value in run] for run in values])
        known = ~np.isnan(shown).all(axis=0)
        x, shown = np.asarray(epochs)[known], shown[:, known]
        axes.plot(x, np.nanmean(shown, axis=0), color=f"C{number}", marker="o", label=label)
        axes.fill_between(x, np.nanmin(shown, axis=0), np.nanmax(shown, axis=0), color=f"C{number}", alpha=0.2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    scale_axis(axes, metric)
    return png_of(figure)


def stacked_bars(labels: Sequence[str], parts: Mapping[str, Sequence[float]], xlabel: str) -> bytes:
    """Draw a bar for each label, with a segment for each part."""
    figure, axes = new_plot(xlabel)
    starts = np.zeros(len(labels))
    for number, (part, values) in enumerate(parts.items()):
        axes.barh(labels, values, left=starts, label=part, color=f"C{number}")
        starts += values
    axes.invert_yaxis()  # the first label is at the top
    axes.tick_params(labelsize="small")
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    return png_of(figure)


def on_axis(metric: Metric, value: float) -> float:
    """Return a value's position on a metric's axis: for a fraction, the distance to 1 in percent."""
    return max(100 * (1 - value), _MIN_ERROR) if metric.is_fraction else value


def scale_axis(axes: Axes, metric: Metric, name: str = "") -> None:
    """Label and scale the vertical axis for a metric.

    A loss gets a logarithmic axis. For a fraction near 1, the logarithmic axis shows the distance to 1, since good
    values differ by tenths of a percent.
    """
    axes.set_ylabel(plain(name or metric.name) + (" (%)" if metric.is_fraction else ""))
    drawn = [value for line in axes.lines for value in np.asarray(line.get_ydata(), float) if np.isfinite(value)]
    low, high = min(drawn, default=1.0), max(drawn, default=1.0)
    if low <= _LINEAR_ABOVE if metric.is_fraction else metric.name == "loss" and low > 0:
        axes.set_yscale("log")
        axes.set_ylabel(f"{axes.get_ylabel()}, log scale")
        label_log_axis(axes.yaxis, low, high)
    if metric.is_fraction:
        axes.invert_yaxis()
        axes.yaxis.set_major_formatter(lambda error, _: f"{100 - error:g}" if error > _MIN_ERROR else "100")


def label_log_axis(axis: Axis, low: float, high: float) -> None:
    """Label 1, 2 and 5 of each power of ten between ``low`` and ``high``; with many powers, only 1."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
