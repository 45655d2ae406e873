"""A sweep's plots: the validation metric over epochs, and over each searched setting."""

from __future__ import annotations

import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mnist_ray.many.ranking import find_best
from mnist_ray.many.table import Many, Member, Table
from mnist_ray.report.plots import label_log_axis, on_axis, scale_axis
from mnist_ray.report.run_files import RUNNING, STOPPED
from mnist_ray.settings import Choice
from mnist_ray.text import count, format_settings, format_value, in_words
from mnist_ray.workload.drawing import plain, png_of
from mnist_ray.workload.figures import Metric

_WIDTH = 9.5  # inches: across the page, the text is as large as the page's own
_TITLE_WIDTH = 80  # characters


def draw(many: Many, table: Table) -> bytes:
    """Draw the validation metric of all trials over the epochs, and over each searched setting that varies, as a PNG.

    Trials that were stopped early are grey or hollow, those of the best configuration are black or ringed, and failed
    trials are left out.
    """
    members = [each for each in table.by_point.values() if table.is_validated(each) and each.state != RUNNING]
    searched, monitor, num_epochs = table.space.spaces, table.workload.monitor, many.job.train.num_epochs
    varied = [name for name in searched if len({each.point.values[name] for each in members}) > 1] or [*searched]
    figure = Figure(figsize=(_WIDTH, 5 + 4 * len(varied)), dpi=150, layout="constrained")
    over_epochs, *plots = figure.subplots(1 + len(varied))
    of_best = [*best.members] if (best := find_best(many, table)) else []
    _draw_over_epochs(over_epochs, monitor, members, of_best)
    for axes, name in zip(plots, varied, strict=True):
        _draw_over(axes, table, members, of_best, name)
    title = [f"{count(len(members), 'trial')} of at most {count(num_epochs, 'epoch')}"]
    if best:
        title.append(f"best: {monitor.format(best.val_monitor)}, {best.mean_of}")
        title += textwrap.wrap(format_settings(dict(best.configuration)), _TITLE_WIDTH)
    over_epochs.set_title(plain("\n".join(title)))
    return png_of(figure)


def _draw_over_epochs(axes: Axes, metric: Metric, members: list[Member], best: list[Member]) -> None:
    """Draw a line for each trial, with a point for each report; grey if the trial was stopped early."""
    for member in sorted(members, key=lambda member: member.state != STOPPED):  # the others are drawn on top
        style: dict[str, Any] = {"color": "silver" if member.state == STOPPED else "tab:blue"}
        style |= {"color": "black", "zorder": 3} if member in best else {}
        epochs, values = [*member.reports], [on_axis(metric, value) for value in member.reports.values()]
        axes.plot(epochs, values, marker=".", alpha=0.7, **style)
    axes.set_xlabel("epoch")
    scale_axis(axes, metric, f"validation {metric.name}")
    axes.grid(alpha=0.3)


def _draw_over(axes: Axes, table: Table, members: list[Member], best: list[Member], name: str) -> None:
    """Draw all trials against a setting."""
    metric, space = table.workload.monitor, table.space.spaces[name]
    for member in members:
        value = member.point.values[name]
        x = space.options.index(value) if isinstance(space, Choice) else value
        y = on_axis(metric, table.value(member))
        fill: dict[str, Any] = {"markerfacecolor": "none"} if member.state == STOPPED else {}
        axes.plot(x, y, color="tab:blue", marker="o", markersize=8, alpha=0.7, linestyle="none", **fill)
        if member in best:
            axes.plot(x, y, color="black", marker="o", markersize=15, linestyle="none", markerfacecolor="none")
    if isinstance(space, Choice):
        axes.set_xticks(range(len(space.options)), [plain(format_value(option)) for option in space.options])
    elif space.log:
        axes.set_xscale("log")
        label_log_axis(axes.xaxis, space.low, space.high)
    axes.set_xlabel(in_words(name))
    scale_axis(axes, metric, f"validation {metric.name}")
    axes.grid(alpha=0.3)
