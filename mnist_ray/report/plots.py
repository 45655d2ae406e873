"""The plots of a run's values: curves over the epochs, and the trials of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib import ticker

from mnist_ray.report.run_files import DONE, STOPPED, WAITING, Run, merged
from mnist_ray.text import in_words
from mnist_ray.workload.base import Picture
from mnist_ray.workload.drawing import new_plot, plain, png_of
from mnist_ray.workload.figures import Figure, Metric, formatted, of_first_set

_MIN_POINTS = 30  # of a curve: each is the mean over the steps since the one before
_STYLES: Mapping[str, Mapping[str, Any]] = {
    "training": {"linewidth": 1},
    "validation": {"linestyle": "--", "marker": "."},
}
_OTHER: Mapping[str, Any] = {"linestyle": ":", "marker": "."}  # of further validation sets


def of_metric(record: Run, metric: Metric) -> list[Picture]:
    """Plot a metric in training and validation."""
    columns = {"training": f"train_{metric.name}", "validation": f"val_{metric.name}"}
    for figure in record.logged:
        first = of_first_set(figure.name, record.workload.all_figures) if "validation" in figure.at else None
        if first is not None and first.name == columns["validation"]:
            columns[figure.label.removesuffix(f" {in_words(metric.name)}")] = figure.name
    return _curves(record, metric.name, metric.name, metric.form, columns)


def of_figure(record: Run, figure: Figure) -> list[Picture]:
    """Plot a column of steps.csv that is no metric."""
    return _curves(record, figure.name, figure.label, figure.form, {"training": figure.name})


def _curves(record: Run, name: str, label: str, form: str, columns: Mapping[str, str]) -> list[Picture]:
    """Plot columns over the epochs: a line for each run that is part of the result; none without any value."""
    is_percentage, ends = form == "fraction", dict[str, float]()
    figure, axes = new_plot("epoch", plain(label) + (" (%)" if is_percentage else ""))
    for member in record.members or [record]:
        size = max(1, len(member.steps) // _MIN_POINTS)
        points = merged(member.steps, size, (*member.workload.all_figures, *member.logged))
        for number, (part, column) in enumerate(columns.items()):
            rows = member.history if column.startswith("val_") else points
            known = [row for row in rows if math.isfinite(row.get(column, math.nan))]
            if known:
                values = [100 * row[column] if is_percentage else row[column] for row in known]
                first = part if part not in ends else ""  # one entry in the legend
                style = {"color": f"C{number}", **_STYLES.get(part, _OTHER)}
                axes.plot([row["epoch"] for row in known], values, label=first, **style)
                ends[part] = known[-1][column]
    if not ends:
        return []
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axes.grid(alpha=0.3)
    if len(columns) > 1:
        axes.legend(fontsize="small")
    said = "; ".join(f"{part} ends at {formatted(value, form)}" for part, value in ends.items())
    caption = "A line for each run." if len(record.members) > 1 else ""
    return [Picture(name, label, f"{label} over the epochs: {said}", png_of(figure), caption)]


def trials(record: Run) -> list[Picture]:
    """Plot a sweep's trials against each searched setting; none before the first validation, or without a sweep."""
    metric, column = record.workload.monitor, f"val_{record.workload.monitor.name}"
    rows = [row for row in record.table if row["state"] in (DONE, STOPPED, WAITING) and row.get(column, "nan") != "nan"]
    spaces = dict(text.split("=", 1) for text in record.config.get("sweep") or ())
    best = {member.name for member in record.members} if record.result else set[str]()
    pictures = []
    for name, space in spaces.items() if rows else ():
        figure, axes = new_plot(plain(in_words(name)), plain(f"validation {metric.name}"))
        for row in rows:
            colour = "black" if row["run"] in best else "silver" if row["state"] == STOPPED else "C0"
            axes.plot([_number_or_text(row[name])], [float(row[column])], "o", color=colour)
        if space.startswith("log:"):
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
        alt = f"Validation {metric.name} of {len(rows)} trials against {in_words(name)}; the table has all values"
        caption = "Grey: stopped early. Black: the best configuration."
        pictures.append(Picture(f"trials_{name}", f"Trials by {in_words(name)}", alt, png_of(figure), caption))
    return pictures


def _number_or_text(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return plain(cell or "none")
