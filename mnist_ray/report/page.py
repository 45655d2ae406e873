"""A run's report, made from the run's files."""

from __future__ import annotations

import base64
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np

from mnist_ray.config import TrainConfig, WorkerConfig
from mnist_ray.data.data import Split
from mnist_ray.errors import JobError, UsageError, with_place
from mnist_ray.output import say
from mnist_ray.report import trials
from mnist_ray.report.plots import Curve, bands_of, curves_of, smoothed, stacked_bars
from mnist_ray.report.run_files import ENDED, Run, number_of, settings_of, workload_of
from mnist_ray.settings import build, values_of
from mnist_ray.storage import REPORT_FILE, RunFolder
from mnist_ray.text import count, in_words, redact
from mnist_ray.training.stopwatch import PARTS
from mnist_ray.workload.base import Picture, Workload
from mnist_ray.workload.calls import data_of, splits_for
from mnist_ray.workload.figures import LOSS, RATE, Figure, Metric, formatted

_MIN_EPOCH, _MIN_PART = 1 / 100, 1 / 30  # of an epoch and of the run: the steps that a curve's point covers
_TRAINING = {"color": "C0", "linewidth": 1}
_VALIDATION = {"color": "C1", "linestyle": "--"}
_MAX_BARS, _MIN_SHARE = 16, 0.002  # of the plot of the time; share of the time below which a part is not shown
_MAX_MARKERS = 50  # of epochs; more would hide the curves


@dataclass(frozen=True)
class Table:
    """A table of strings; without ``columns``, it has pairs of a name and a value, and no header."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    num_bold: int = 0  # of the first rows
    is_wide: bool = True  # takes the page's whole width


def page_of(**content: Any) -> str:
    """Return the template with this content, as one file that needs no network."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mnist_ray.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: "\n".join(map(redact, value.split("\n"))) if isinstance(value, str) else value,
    )
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode("ascii")
    return environment.get_template("report.html.jinja").render(page=content)


def write(
    run: RunFolder,
    workload: Workload,
    resume_with: str,
    test: Split | None,
    warn: Callable[[str], None] = lambda note: None,
) -> dict[str, bytes]:
    """Write report.html, which holds its images; return these as PNGs, by name. Raises UsageError and JobError.

    ``test`` has the examples that were predicted; without it, none are shown. If an image cannot be drawn, ``warn``
    gets a note.
    """
    record = Run(run, workload)
    result, columns = record.result, record.predictions
    num_predicted = len(next(iter(columns.values()), ()))
    notes = list[str]()
    drawn = functools.partial(_drawn, workload, notes)
    if test is not None and columns and len(test) != num_predicted:
        notes.append(f"no {workload.nouns} are shown: the test set had {num_predicted:,} and now has {len(test):,}")
        test = None
    pictures = drawn("plot of the trials", lambda: trials.pictures(record))
    for metric in workload.all_metrics:
        curves = _bands if record.table else _curves
        pictures += drawn(f"curve of {metric.name}", functools.partial(curves, record, metric))
    if result:
        of_test = functools.partial(workload.pictures, result)
        of_examples = columns and drawn("images of the predictions", lambda: of_test(test, columns))
        pictures += of_examples or drawn("images of the test", lambda: of_test(None, {}))
    not_metrics = [figure for figure in workload.all_figures if "step" in figure.at and figure.over != "mean"]
    for figure in (*record.logged, *not_metrics):  # curves of metrics have their validation, too
        pictures += drawn(f"curve of the {figure.label}", functools.partial(_over_steps, record, figure))
    pictures += drawn("plot of the time", lambda: _time_spent(record))
    pngs = {re.sub(r"[^\w.@-]", "_", picture.name): picture.png for picture in pictures}  # a "/" would name a folder
    seconds = drawn("table of the seconds", lambda: _seconds(result)) if result else []
    members = drawn("table of the runs", lambda: _members(record)) if record.table else []
    tables = [*members, *_epochs(record), *_settings(record), *seconds]
    page = page_of(
        title=run.name,
        status=_status(record, resume_with),
        headlines=_headlines(record),
        notes=[*result.get("notes", []), *notes],
        pictures=pictures,
        tables=tables,
    )
    run.write_text(REPORT_FILE, page)
    for note in notes:
        warn(note)
    return pngs


def _drawn(workload: Workload, notes: list[str], what: str, draw: Callable[[], Iterable[Any]]) -> list[Any]:
    """Return the pictures or tables that ``draw`` returns; if it fails, add a note and return none."""
    try:
        parts = list(draw())
        if wrong := [part for part in parts if not isinstance(part, (Picture, Table))]:
            raise TypeError(f"{type(wrong[0]).__name__} is not a mnist_ray.workload.Picture")
    except (Exception, SystemExit) as error:  # files may hold anything, and workloads draw with their own code
        notes.append(f"no {what}: {with_place(error, workload.source.folder)}")
        return []
    return parts


def _status(record: Run, resume_with: str) -> str:
    """Return how far a run is. A second line has its date, the size of its model and its workers, if they are known."""
    done = max(record.column("epoch"), default=0)
    epochs, nouns = f"{done:.0f} of {record.config.get('num_epochs', '?')} epochs", record.workload.nouns
    if record.table:
        ended = sum(row["state"] in ENDED for row in record.table)
        epochs = f"{ended} of {count(len(record.table), 'run')}"
    known = {"started": "started {!s:.16}", "parameters": "{} parameters", "workers": "{}"}
    about = " · ".join(said.format(record.origin[name]) for name, said in known.items() if name in record.origin)
    if not record.result:
        return f"not finished: {epochs} done, not tested yet. To resume: {resume_with}\n{about}"
    tested = formatted(number_of(record.result.get("num_test_examples")), ",.0f")
    return f"finished: {epochs}, tested on {tested} {nouns}\n{about}"


def _headlines(record: Run) -> dict[str, str]:
    """Return the most important values of a run, formatted."""
    workload, result, lines = record.workload, record.result, dict[str, str]()
    if result:
        for metric in (*workload.metrics, LOSS):
            lines[f"test {metric.name}"] = metric.format(number_of(result.get(f"test_{metric.name}")))
            if spread := result.get("spread", {}).get(f"test_{metric.name}"):
                low, high = (metric.format(number_of(value)) for value in spread["interval"])
                lines[f"mean {metric.name}, 95 %"] = f"{low} to {high}"
    if not math.isnan(record.best_validation):
        lines[f"best validation {workload.monitor.name}"] = workload.monitor.format(record.best_validation)
    if result:
        lines[f"{workload.nouns}/s in training"] = formatted(number_of(result.get(RATE)), ",.0f")
        lines["seconds until tested"] = formatted(number_of(result["seconds"].get("total")), ".1f")
        lines["workers"] = str(result.get("num_workers", "-"))
    return lines


def _curves(record: Run, metric: Metric) -> list[Picture]:
    steps = [row["step"] for row in record.steps]
    if not steps:
        return []
    total = steps[-1]
    training = [row.get(f"train_{metric.name}", math.nan) for row in record.steps]
    min_steps = min(max(_MIN_EPOCH * record.steps_per_epoch, _MIN_PART * total), record.steps_per_epoch)
    ends = [min(epoch * record.steps_per_epoch, total) for epoch in record.column("epoch")]
    marker = "o" if len(ends) <= _MAX_MARKERS else ""
    drawn = [
        smoothed(Curve("training", steps, training, _TRAINING), min_steps),
        Curve("validation", ends, record.column(f"val_{metric.name}"), {**_VALIDATION, "marker": marker}),
    ]
    last = "; ".join(f"{curve.label} ends at {metric.format(curve.values[-1])}" for curve in drawn if curve.values)
    png = curves_of(metric, drawn, record.steps_per_epoch)
    return [Picture(metric.name, metric.name, f"{metric.name} over {total:,.0f} steps. {last}", png)]


def _over_steps(record: Run, figure: Figure) -> list[Picture]:
    values = [row.get(figure.name, math.nan) for row in record.steps]
    if all(map(math.isnan, values)):  # no such figure in this run
        return []
    curve = Curve(figure.label, [row["step"] for row in record.steps], values, _TRAINING)
    png = curves_of(Metric(figure.label, "min", figure.form == "fraction"), [curve], record.steps_per_epoch)
    title, end = figure.label.capitalize(), formatted(values[-1], figure.form)
    return [Picture(figure.name, title, f"{title} over the steps. It ends at {end}", png)]


def _time_spent(record: Run) -> list[Picture]:
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
    shares = ", ".join(f"{label} {sum(values) / total:.0%}" for label, values in shown.items())
    png = stacked_bars(bars, shown, "seconds")
    return [Picture("time", "Where the time went", f"Mean seconds of a worker: {shares}", png)]


def _members(record: Run) -> list[Table]:
    """Return the rows of members.csv, best first, with the tests of those that are tested."""
    monitor = record.workload.monitor
    shown = {figure.name: figure for figure in record.workload.all_figures if figure.at != ("step",)}
    tests = [Metric(f"test_{metric.name}", metric.mode, metric.is_fraction) for metric in record.workload.all_metrics]
    tests = [test for test in tests if any(test.name in member.result for member in record.all_members)]
    kept = str(record.result.get("checkpoint")).split("/")[1:2]

    def cell(name: str, text: str) -> str:
        return formatted(float(text or math.nan), shown[name].form) if name in shown else _shortened(text)

    def rank(member: Run) -> tuple[bool, float]:
        value = float(member.row.get(f"val_{monitor.name}") or math.nan)
        return math.isnan(value), -value if monitor.mode == "max" else value

    members = sorted(record.all_members, key=rank)
    known = [name for name in members[0].row if any(member.row[name] for member in members)]
    columns = [name for name in known if name not in ("run", "reports")]
    rows = []
    for member in members:
        row = {**member.row, "state": member.row["state"] + ", kept" * ([member.row["run"]] == kept)}
        of_test = [test.format(number_of(member.result.get(test.name))) for test in tests]
        rows.append((*(cell(name, row[name]) for name in columns), *of_test))
    headers = [shown[name].label if name in shown else in_words(name) for name in columns]
    return [Table("Runs, best first", [*headers, *(in_words(test.name) for test in tests)], rows)]


def _shortened(text: str) -> str:
    """Return a text from a CSV file; a fractional number gets at most five digits."""
    try:
        return text if text.isdigit() else formatted(float(text), ".5g")
    except ValueError:
        return text


def _seconds(result: Mapping[str, Any]) -> list[Table]:
    title = "Seconds until tested"
    rows = [(name, formatted(number_of(value), ".1f")) for name, value in result["seconds"].items()]
    return [Table(title, (), rows, is_wide=False)]


def _bands(record: Run, metric: Metric) -> list[Picture]:
    epochs = sorted({row["epoch"] for member in record.members for row in member.history})

    def values(column: str) -> np.ndarray:
        runs = [{row["epoch"]: row.get(column, math.nan) for row in member.history} for member in record.members]
        return np.array([[run.get(epoch, math.nan) for epoch in epochs] for run in runs])

    columns = {"training": values(f"train_{metric.name}"), "validation": values(f"val_{metric.name}")}
    known = {label: of_runs for label, of_runs in columns.items() if not np.isnan(of_runs).all()}
    if not known:
        return []
    alt = f"{metric.name} of {count(len(record.members), 'run')} over {len(epochs)} epochs"
    caption = "Lines: means of the runs. Bands: from the lowest to the highest." if len(record.members) > 1 else ""
    return [Picture(metric.name, metric.name, alt, bands_of(metric, epochs, known), caption)]


def _epochs(record: Run) -> list[Table]:
    if not record.history:
        return []
    every = (*record.workload.all_figures, *record.logged)
    shown = [figure for figure in every if figure.label and {"epoch", "validation"} & {*figure.at}]
    known = [name for row in record.history for name, value in row.items() if not math.isnan(value)]
    shown = [figure for figure in shown if figure.over == "last" or figure.name in known]  # speed and time always
    rows = [
        (f"{row['epoch']:.0f}", *(formatted(row.get(figure.name, math.nan), figure.form) for figure in shown))
        for row in record.history
    ]
    return [Table("Epochs", ["epoch", *(figure.label for figure in shown)], rows)]


def _settings(record: Run) -> list[Table]:
    """Return the settings, those that differ from the workload's defaults first, and the origin."""
    defaults = {**values_of(WorkerConfig()), **record.workload.defaults}
    defaults = json.loads(json.dumps(defaults))  # tuples are lists in config.json
    used = {name: record.config[name] for name in record.config if name not in record.origin.get("unused_settings", ())}
    changed = {name: value for name, value in used.items() if value != defaults.get(name, value)}
    rows = [(name, f"{value} (default: {defaults[name]})") for name, value in changed.items()]
    rows += [(name, f"{value}") for name, value in used.items() if name not in changed]
    origin = {**record.origin, **record.origin.get("versions", {})}
    said = [(name, str(value)) for name, value in origin.items() if not isinstance(value, (dict, list))]
    return [Table("Settings", (), rows, num_bold=len(changed)), Table("Origin", (), said)]


def write_again(run: RunFolder, reference: str | None, storage_path: str, resume_with: str) -> None:
    """Rewrite the report of a run. Raises UsageError and JobError."""
    workload, test = workload_of(run, reference, storage_path), None
    try:
        config = build(TrainConfig, settings_of(run))
        test = splits_for(workload, data_of(workload), config).test
    except (UsageError, JobError) as error:
        say(f"no {workload.nouns} are shown: {error}")
    write(run, workload, resume_with, test, lambda note: say(f"note {note}"))
    say(f"report {run.inside(REPORT_FILE).uri}")
