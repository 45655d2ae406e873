"""The plots of a sweep's trials, from its files: the validation metric over epochs, and over each searched setting."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mnist_ray.report.plots import label_log_axis, on_axis, scale_axis
from mnist_ray.report.run_files import DONE, STOPPED, WAITING, Run
from mnist_ray.text import count, in_words
from mnist_ray.workload.base import Picture
from mnist_ray.workload.drawing import plain, png_of
from mnist_ray.workload.figures import Metric

_WIDTH = 9.5  # inches: across the page, the text is as large as the page's own
_TITLE_WIDTH = 80  # characters
Row = Mapping[str, str]  # of members.csv


def pictures(record: Run) -> list[Picture]:
    """Return the plots of a sweep's trials; none if the run is not a sweep, or before the first validation.

    Trials that were stopped early are grey or hollow, those of the best configuration are black or ringed, and failed
    trials are left out.
    """
    spaces = dict(text.split("=", 1) for text in record.config.get("sweep") or ())
    column = f"val_{record.workload.monitor.name}"
    rows = [row for row in record.table if row["state"] in (DONE, STOPPED, WAITING)]
    rows = [row for row in rows if not math.isnan(float(row.get(column) or math.nan))]
    if not spaces or not rows:
        return []
    tested = {tuple(member.row[name] for name in spaces) for member in record.members if member.result}
    best = [row for row in rows if tuple(row[name] for name in spaces) in tested and row["state"] == DONE]
    varied = [name for name in spaces if len({row[name] for row in rows}) > 1] or [*spaces]
    figure = Figure(figsize=(_WIDTH, 5 + 4 * len(varied)), dpi=150, layout="constrained")
    over_epochs, *plots = figure.subplots(1 + len(varied))
    _draw_over_epochs(over_epochs, record.workload.monitor, rows, best)
    for axes, name in zip(plots, varied, strict=True):
        _draw_over(axes, record.workload.monitor, rows, best, name, spaces[name])
    title = [f"{count(len(rows), 'trial')} of at most {count(int(record.config.get('num_epochs', 0)), 'epoch')}"]
    if best:
        value = statistics.mean(float(row[column]) for row in best)
        mean = f"mean of {len(best)} runs" if len(best) > 1 else f"seed {best[0]['seed']}"
        title.append(f"best: {record.workload.monitor.format(value)}, {mean}")
        settings = ", ".join(f"{in_words(name)} {best[0][name]}" for name in spaces)
        title += textwrap.wrap(settings, _TITLE_WIDTH)
    over_epochs.set_title(plain("\n".join(title)))
    alt = f"Validation {record.workload.monitor.name} of {len(rows)} trials; the table has all values"
    caption = "Grey or hollow: stopped early. Black or ringed: the best configuration."
    return [Picture("sweep", "Trials", alt, png_of(figure), caption, is_wide=True)]


def _draw_over_epochs(axes: Axes, metric: Metric, rows: Sequence[Row], best: Sequence[Row]) -> None:
    """Draw a line for each trial, with a point for each report; grey if the trial was stopped early."""
    for row in sorted(rows, key=lambda row: row["state"] != STOPPED):  # the others are drawn on top
        style: dict[str, Any] = {"color": "silver" if row["state"] == STOPPED else "tab:blue"}
        style |= {"color": "black", "zorder": 3} if row in best else {}
        reports = [tuple(map(float, report.split(":"))) for report in row["reports"].split()]
        values = [on_axis(metric, value) for _, value in reports]
        axes.plot([epochs for epochs, _ in reports], values, marker=".", alpha=0.7, **style)
    axes.set_xlabel("epoch")
    scale_axis(axes, metric, f"validation {metric.name}")
    axes.grid(alpha=0.3)


def _draw_over(axes: Axes, metric: Metric, rows: Sequence[Row], best: Sequence[Row], name: str, space: str) -> None:
    """Draw all trials against a setting, whose ``space`` is a text of ``--sweep``: a range, or a list of values."""
    low, is_range, high = space.removeprefix("log:").partition(":")
    options = [*dict.fromkeys(row[name] for row in rows)]
    if all(_is_number(option) for option in options):
        options.sort(key=float)
    for row in rows:
        x = float(row[name]) if is_range else options.index(row[name])
        y = on_axis(metric, float(row[f"val_{metric.name}"]))
        fill: dict[str, Any] = {"markerfacecolor": "none"} if row["state"] == STOPPED else {}
        axes.plot(x, y, color="tab:blue", marker="o", markersize=8, alpha=0.7, linestyle="none", **fill)
        if row in best:
            axes.plot(x, y, color="black", marker="o", markersize=15, linestyle="none", markerfacecolor="none")
    if not is_range:
        axes.set_xticks(range(len(options)), [plain(option or "none") for option in options])
    elif space.startswith("log:"):
        axes.set_xscale("log")
        label_log_axis(axes.xaxis, float(low), float(high))
    axes.set_xlabel(in_words(name))
    scale_axis(axes, metric, f"validation {metric.name}")
    axes.grid(alpha=0.3)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
