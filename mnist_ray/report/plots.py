"""The plots of a run's values: curves, where the time went, a sweep's trials; on axes that fit the metric."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from mnist_ray.report.run_files import DONE, STOPPED, WAITING, Run, merged
from mnist_ray.text import count, in_words
from mnist_ray.training.stopwatch import PARTS
from mnist_ray.workload.base import Picture
from mnist_ray.workload.drawing import new_plot, plain, png_of
from mnist_ray.workload.figures import Figure as Column
from mnist_ray.workload.figures import Metric, formatted

_MIN_ERROR = 0.01  # percent: stands for 0 on a logarithmic axis
_LINEAR_ABOVE = 10.0  # percent of mistakes: the axis is linear if all values are above
_MIN_POINTS = 30  # of a curve: each is the mean over the steps since the one before
_MAX_BARS, _MIN_SHARE = 16, 0.002  # of the plot of the time; share of the time below which a part is not shown
_TRAINING: dict[str, Any] = {"color": "C0", "linewidth": 1}
_VALIDATION: dict[str, Any] = {"color": "C1", "linestyle": "--", "marker": "."}
_WIDTH = 9.5  # inches: across the page, the text is as large as the page's own
Row = Mapping[str, str]  # of members.csv


def curves(record: Run, metric: Metric) -> list[Picture]:
    """Plot a metric over the steps; if several runs are the result, that of each over its epochs."""
    if len(record.members) > 1:
        return _of_members(record, metric)
    record = record.members[0] if record.members else record
    if not record.steps:
        return []
    epoch, total = record.steps_per_epoch, record.steps[-1]["step"]
    ends = [min(number * epoch, total) for number in record.column("epoch")]
    figure, axes = _over_steps(epoch)
    points = merged(record.steps, min(total / _MIN_POINTS, epoch), record.workload.all_figures)
    means = [row.get(f"train_{metric.name}", math.nan) for row in points]
    validation = record.column(f"val_{metric.name}")
    _draw(axes, metric, [row["step"] for row in points], means, label="training", **_TRAINING)
    _draw(axes, metric, ends, validation, label="validation", **_VALIDATION)
    parts = {"training": means, "validation": validation}
    last = "; ".join(f"{label} ends at {metric.format(values[-1])}" for label, values in parts.items() if values)
    return [_finished(figure, axes, metric, f"{metric.name} over {total:,.0f} steps. {last}")]


def _of_members(record: Run, metric: Metric) -> list[Picture]:
    figure, axes = new_plot("epoch")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    for part, label, style in (("train", "training", _TRAINING), ("val", "validation", _VALIDATION)):
        for member in record.members:
            values = member.column(f"{part}_{metric.name}")
            _draw(axes, metric, member.column("epoch"), values, label=label, alpha=0.7, **style)
            label = ""  # only the first has one
    alt = f"{metric.name} of {count(len(record.members), 'run')} over their epochs"
    return [_finished(figure, axes, metric, alt, "A line for each run.")] if axes.lines else []


def over_steps(record: Run, column: Column) -> list[Picture]:
    """Plot a column of steps.csv that is no metric; none if the run has no such values."""
    values = [row.get(column.name, math.nan) for row in record.steps]
    if all(map(math.isnan, values)):
        return []
    figure, axes = _over_steps(record.steps_per_epoch)
    metric, title = Metric(column.label, "min", column.form == "fraction"), column.label.capitalize()
    _draw(axes, metric, [row["step"] for row in record.steps], values, label=column.label, **_TRAINING)
    alt = f"{title} over the steps. It ends at {formatted(values[-1], column.form)}"
    return [_finished(figure, axes, metric, alt, name=column.name, title=title)]


def _over_steps(steps_per_epoch: float) -> tuple[Figure, Axes]:
    """Return a plot over steps, with epochs along the top."""
    figure, axes = new_plot("step")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    functions = (lambda steps: steps / steps_per_epoch, lambda epochs: epochs * steps_per_epoch)
    epochs = axes.secondary_xaxis("top", functions=functions)
    epochs.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    epochs.set_xlabel("epoch")
    return figure, axes


def _draw(axes: Axes, metric: Metric, x: Iterable[float], values: Iterable[float], **style: Any) -> None:
    """Draw a line through the values that are known."""
    points = [(at, on_axis(metric, value)) for at, value in zip(x, values, strict=True) if math.isfinite(value)]
    if points:
        axes.plot([at for at, _ in points], [value for _, value in points], **style)


def _finished(
    figure: Figure, axes: Axes, metric: Metric, alt: str, caption: str = "", name: str = "", title: str = ""
) -> Picture:
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    scale_axis(axes, metric)
    return Picture(name or metric.name, title or metric.name, alt, png_of(figure), caption)


def time_spent(record: Run) -> list[Picture]:
    """Draw the mean seconds of a worker by part, in a bar per epoch or, if these are too many, per some epochs."""
    last = math.ceil(max((row["epoch"] for row in record.steps), default=1))
    width = math.ceil(last / _MAX_BARS)  # epochs
    firsts = range(1, last + 1, width)
    of_bars = [[row for row in record.steps if first - 1 < row["epoch"] <= first - 1 + width] for first in firsts]
    seconds = {
        label: [math.fsum(row.get(f"{part}_s") or 0.0 for row in rows) for rows in of_bars]
        for part, label in PARTS.items()
    }
    total = math.fsum(itertools.chain(*seconds.values()))
    shown = {label: values for label, values in seconds.items() if sum(values) > _MIN_SHARE * total}
    if not shown:
        return []
    bars = [f"epoch {first}" if width == 1 else f"epochs {first} to {min(first + width - 1, last)}" for first in firsts]
    figure, axes = new_plot("seconds")
    starts = np.zeros(len(bars))
    for label, values in shown.items():
        axes.barh(bars, values, left=starts, label=label)
        starts += values
    axes.invert_yaxis()  # the first epoch is at the top
    axes.tick_params(labelsize="small")
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    shares = ", ".join(f"{label} {sum(values) / total:.0%}" for label, values in shown.items())
    return [Picture("time", "Where the time went", f"Mean seconds of a worker: {shares}", png_of(figure))]


def trials(record: Run) -> list[Picture]:
    """Plot a sweep's trials; none if the run is not a sweep, or before the first validation.

    Trials that were stopped early are grey or hollow, those of the best configuration are black or ringed, and failed
    trials are left out.
    """
    spaces = dict(text.split("=", 1) for text in record.config.get("sweep") or ())
    monitor, column = record.workload.monitor, f"val_{record.workload.monitor.name}"
    rows = [row for row in record.table if row["state"] in (DONE, STOPPED, WAITING) and row.get(column, "nan") != "nan"]
    if not spaces or not rows:
        return []
    tested = {tuple(member.row[name] for name in spaces) for member in record.members if member.result}
    best = [row for row in rows if tuple(row[name] for name in spaces) in tested and row["state"] == DONE]
    varied = [name for name in spaces if len({row[name] for row in rows}) > 1] or [*spaces]
    figure = Figure(figsize=(_WIDTH, 5 + 4 * len(varied)), dpi=150, layout="constrained")
    over_epochs, *plots = figure.subplots(1 + len(varied))
    for row in sorted(rows, key=lambda row: (row in best, row["state"] != STOPPED)):  # the best is drawn on top
        colour = "black" if row in best else "silver" if row["state"] == STOPPED else "tab:blue"
        reports = np.array([report.split(":") for report in row["reports"].split()], float).reshape(-1, 2)
        _draw(over_epochs, monitor, reports[:, 0], reports[:, 1], marker=".", alpha=0.7, color=colour)
    over_epochs.set_xlabel("epoch")
    for axes, name in zip(plots, varied, strict=True):
        _draw_over(axes, monitor, rows, best, name, spaces[name])
    for axes in (over_epochs, *plots):
        axes.grid(alpha=0.3)
        scale_axis(axes, monitor, f"validation {monitor.name}")
    alt = f"Validation {monitor.name} of {len(rows)} trials; the table has all values"
    caption = "Grey or hollow: stopped early. Black or ringed: the best configuration"
    if best:
        mean = monitor.format(statistics.mean(float(row[column]) for row in best))
        settings = ", ".join(f"{in_words(name)} {best[0][name]}" for name in spaces)
        caption += f", {settings}: {mean}, {count(len(best), 'run')}"
    return [Picture("sweep", "Trials", alt, png_of(figure), caption, is_wide=True)]


def _draw_over(axes: Axes, metric: Metric, rows: Sequence[Row], best: Sequence[Row], name: str, space: str) -> None:
    """Draw all trials against a setting, whose ``space`` is a text of ``--sweep``: a range, or a list of values."""
    low, is_range, high = space.removeprefix("log:").partition(":")
    options = [*dict.fromkeys(row[name] for row in rows)]
    try:
        options.sort(key=float)
    except ValueError:  # words, which may contain colons, stay in the order of the trials
        is_range = ""
    for row in rows:
        x = float(row[name]) if is_range else options.index(row[name])
        y = on_axis(metric, float(row[f"val_{metric.name}"]))
        fill: dict[str, Any] = {"markerfacecolor": "none"} if row["state"] == STOPPED else {}
        axes.plot(x, y, "o", color="tab:blue", markersize=8, alpha=0.7, **fill)
        if row in best:
            axes.plot(x, y, "o", color="black", markersize=15, markerfacecolor="none")
    if not is_range:
        axes.set_xticks(range(len(options)), [plain(option or "none") for option in options])
    elif space.startswith("log:"):
        axes.set_xscale("log")
        label_log_axis(axes.xaxis, float(low), float(high))
    axes.set_xlabel(in_words(name))


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
