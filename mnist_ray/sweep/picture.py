"""A sweep's picture, of what came out over what was searched, and its part of the report."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mnist_ray.errors import count, format_settings, format_value, in_words
from mnist_ray.report.curves import placed, scale_axis
from mnist_ray.report.page import Sections, unless_failing
from mnist_ray.settings import Choice, Range, SearchSpace
from mnist_ray.storage import CONFIG_FILE, SWEEP_FILE, TRIALS_FILE, DamagedFileError, RunFolder
from mnist_ray.sweep.space import space_of
from mnist_ray.sweep.trials import RUNNING, STOPPED, TrialRecord, TrialTable
from mnist_ray.workload import figures
from mnist_ray.workload.base import Workload
from mnist_ray.workload.figures import MARKERS, png_of

_TITLE_WIDTH = 72  # characters


def draw(table: TrialTable, num_epochs: int) -> bytes:
    """Draw the validation of all trials over each setting that was searched, as a PNG.

    The first choice among the settings has a colour and marker for each value, where another is there to draw it over.
    Trials that were stopped early are hollow, the best configuration's are ringed, failed ones are left out.
    """
    records = _shown(table)
    spaces = _varied(table, records) or dict(table.space.spaces)  # where nothing varies, all of it
    coloured = next((name for name, space in spaces.items() if isinstance(space, Choice)), None)
    over = [name for name in spaces if name != coloured] or list(spaces)
    figure = Figure(figsize=(8, 5 * len(over)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    plots = figure.subplots(len(over), squeeze=False)[:, 0]
    for axes, name in zip(plots, over, strict=True):
        _draw_over(axes, table, records, name, spaces[name], coloured if coloured != name else None)
    plots[0].set_title(_title(table, len(records), num_epochs))
    handles, labels = plots[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    return png_of(figure)


def _shown(table: TrialTable) -> list[TrialRecord]:
    return [record for record in table.by_point.values() if record.is_validated and record.state != RUNNING]


def _varied(table: TrialTable, records: list[TrialRecord]) -> dict[str, SearchSpace]:
    """Return the spaces of which the trials have more than one value."""
    tried = {name: {record.point.values[name] for record in records} for name in table.space.spaces}
    return {name: space for name, space in table.space.spaces.items() if len(tried[name]) > 1}


def _draw_over(
    axes: Axes, table: TrialTable, records: list[TrialRecord], name: str, space: SearchSpace, coloured: str | None
) -> None:
    """Draw all trials over one setting."""
    metric = table.workload.monitor

    def place(record: TrialRecord) -> tuple[float, float]:
        value = record.point.values[name]
        x = space.options.index(value) if isinstance(space, Choice) else value
        return x, placed(metric, record.val_monitor)

    def value_of(record: TrialRecord) -> Any:
        return record.point.values[coloured] if coloured else None

    values: list[Any] = [None]
    if coloured:
        tried = {value_of(record) for record in records}
        colours = table.space.spaces[coloured]
        assert isinstance(colours, Choice)
        values = [option for option in colours.options if option in tried]
    for number, value in enumerate(values):
        style: dict[str, Any] = {"color": f"C{number % 10}", "marker": MARKERS[number % 8], "linestyle": "none"}
        for record in records:
            if value_of(record) == value:
                fill: dict[str, Any] = {"markerfacecolor": "none"} if record.state == STOPPED else {}
                axes.plot(*place(record), markersize=8, alpha=0.7, **style, **fill)
        if coloured:
            axes.plot([], [], label=f"{in_words(coloured)} {format_value(value)}", **style)
    if any(record.state == STOPPED for record in records):
        axes.plot([], [], "o", color="grey", markerfacecolor="none", label="stopped early")
    if table.best is not None:
        for record in table.best.records:
            axes.plot(*place(record), "o", color="black", markerfacecolor="none", markersize=15)
        axes.plot([], [], "o", color="black", markerfacecolor="none", markersize=12, label="best configuration")
    if isinstance(space, Choice):
        axes.set_xticks(range(len(space.options)), list(map(format_value, space.options)))
    elif isinstance(space, Range) and space.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel(in_words(name))
    scale_axis(axes, metric, f"validation {metric.name}")
    axes.grid(alpha=0.3)


def _title(table: TrialTable, number: int, num_epochs: int) -> str:
    title, best = f"{count(number, 'trial')} of at most {count(num_epochs, 'epoch')}", table.best
    if best is None or math.isnan(best.val_monitor):
        return title
    said = table.workload.monitor.format(best.val_monitor)
    about_best = f"best: {format_settings(dict(best.configuration))} ({said}, {best.seeds_text})"
    return "\n".join([title, *textwrap.wrap(about_best, _TITLE_WIDTH)])


def sections(run: RunFolder, workload: type[Workload]) -> Sections:
    """Return a sweep's part of the report that lies in its folder; nothing where the run is no sweep.

    Where its files are damaged, only a note that says so. Raises UsageError where they hold settings that cannot be.
    """
    if not run.exists(TRIALS_FILE):
        return Sections()
    try:
        swept = run.require_json(SWEEP_FILE) if run.exists(SWEEP_FILE) else {}
        table = TrialTable(workload, space_of(workload, swept)).read(run)
    except DamagedFileError as error:
        return Sections(notes=[str(error)])
    num_epochs = (run.read_json(CONFIG_FILE) or {}).get("num_epochs", 0)
    monitor = table.workload.monitor.name
    alt = f"Validation {monitor} of {len(table.by_point)} trials; the table has all figures"
    caption = ("Hollow: stopped early. " if table.count(STOPPED) else "") + "Ringed: the best configuration."
    rows = [table.console_row(record, num_epochs) for record in table.ranked]
    notes: list[str] = []

    def pictures() -> list[figures.Picture]:
        return [figures.Picture("sweep", "Trials", alt, draw(table, num_epochs), caption)]

    return Sections(
        unless_failing("picture of the trials", pictures, table.workload, notes),
        [figures.Table("Trials, best first", table.console_columns, rows)],
        notes,
    )
