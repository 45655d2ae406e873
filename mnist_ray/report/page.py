"""The page that shows how a run went, made from what the run has left on disk; and one that compares several."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jinja2

from mnist_ray.errors import UsageError, count, masked, with_place
from mnist_ray.report import curves
from mnist_ray.report.curves import Curve
from mnist_ray.report.run_files import METRICS_FILE, PREDICTIONS_FILE, numbers_of, read_csv, read_figures, read_steps
from mnist_ray.storage import (
    CONFIG_FILE,
    OPERATORS_FILE,
    REPORT_FILE,
    RESULT_FILE,
    RunFolder,
    read_config,
    read_origin,
    read_result,
    unless_damaged,
)
from mnist_ray.workload.base import Metric, Workload
from mnist_ray.workload.data import Split
from mnist_ray.workload.figures import Picture, Table

T = TypeVar("T", Picture, Table)
PICTURES_FOLDER = "pictures"
_REFRESH_S = 10


@dataclass(frozen=True)
class Sections:
    """What a report shows besides: a sweep's trials."""

    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()  # what the user is to know of them


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder tells of it."""

    run: RunFolder
    workload: Workload
    config: dict[str, Any]
    origin: dict[str, Any]  # versions, command line, commit
    epochs: list[dict[str, float]]  # rows of metrics.csv; NaN where a figure is not there (yet)
    steps: list[dict[str, float]]  # rows of steps.csv
    result: dict[str, Any] | None  # none where the run has not finished
    predictions: list[dict[str, str]]  # rows of predictions.csv; none where the run has not finished
    notes: Sequence[str] = ()  # which of the files are damaged, and so left out

    @classmethod
    def read(cls, run: RunFolder, workload: Workload) -> RunRecord:
        """Read a run's files. Raises UsageError where it has no settings, JobError where these are damaged."""
        config, notes = settings_of(run), list[str]()
        result = unless_damaged(lambda: _checked_result(run, workload), notes.append)
        return cls(
            run,
            workload,
            config,
            unless_damaged(lambda: read_origin(run), notes.append) or {},
            numbers_of(unless_damaged(lambda: read_figures(run, METRICS_FILE, "epoch"), notes.append) or []),
            numbers_of(unless_damaged(lambda: read_steps(run), notes.append) or []),
            result,
            unless_damaged(lambda: _checked_predictions(run, workload, result), notes.append) or [],
            notes,
        )

    def column(self, name: str) -> list[float]:
        """Return a column of metrics.csv; NaN where it has none of that name."""
        return [row.get(name, math.nan) for row in self.epochs]

    @property
    def steps_per_epoch(self) -> float:
        """Steps of an epoch; 1 where none was trained."""
        return self.steps[-1]["step"] / self.steps[-1]["epoch"] if self.steps else 1.0

    @property
    def best_validation(self) -> float:
        """Of the workload's monitor; NaN where nothing was validated."""
        monitor = self.workload.monitor
        known = [value for value in self.column(f"val_{monitor.name}") if not math.isnan(value)]
        return (max if monitor.mode == "max" else min)(known, default=math.nan)


@dataclass(frozen=True)
class Page:
    """What the template is filled with."""

    title: str
    status: str
    headlines: Mapping[str, str]
    notes: Sequence[str] = ()
    pictures: Sequence[Picture] = field(default_factory=list)
    tables: Sequence[Table] = field(default_factory=list)
    refresh_s: int = 0  # after so many seconds a browser loads it again; 0: never

    def to_html(self) -> str:
        """Return the page: one file that needs no other and no network."""
        loader = jinja2.PackageLoader("mnist_ray.report", "")
        environment = jinja2.Environment(
            loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, finalize=_without_secrets
        )
        return environment.get_template("report.html.jinja").render(page=self)


def _without_secrets(value: object) -> object:
    return masked(value) if isinstance(value, str) else value


def settings_of(run: RunFolder) -> dict[str, Any]:
    """Return the settings of a run. Raises UsageError where it has none, JobError where they are damaged."""
    config = read_config(run)
    if config is None:
        raise UsageError(f"{run.uri} is no run: it has no {CONFIG_FILE}")
    return config


def _checked_result(run: RunFolder, workload: Workload) -> dict[str, Any] | None:
    """Return what came out of a run, of which the figures that the page shows are numbers where they are there."""
    result = read_result(run)
    if result is None:
        return None
    names = [f"test_{metric.name}" for metric in workload.all_metrics] + [f"num_test_{workload.nouns}", workload.rate]
    seconds = result.get("seconds")
    if not isinstance(seconds, dict) or "total" not in seconds:
        raise run.damaged(RESULT_FILE, "it has no seconds")
    for value in (*seconds.values(), *(result[name] for name in names if result.get(name) is not None)):
        if not isinstance(value, (int, float)):
            raise run.damaged(RESULT_FILE, f"{value!r:.40} is no number")
    return result


def _checked_predictions(run: RunFolder, workload: Workload, result: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """Return the predictions that a run's result was made of."""
    if result is None or not run.exists(PREDICTIONS_FILE):
        return []
    rows, number = read_csv(run, PREDICTIONS_FILE), result.get(f"num_test_{workload.nouns}")
    if len(rows) != number:
        raise run.damaged(PREDICTIONS_FILE, f"it has {len(rows):,} rows, and the test set {number} {workload.nouns}")
    return rows


def write(
    run: RunFolder,
    workload: Workload,
    resume_with: str,
    test: Split | None,
    sections: Sections | None = None,
    warn: Callable[[str], None] = lambda note: None,
    *,
    is_running: bool = False,
) -> dict[str, bytes]:
    """Write a run's report.html and its pictures as PNGs; return these by name. Raises UsageError and JobError.

    ``test`` are the examples that predictions.csv is about; without them there are no pictures of predictions. What
    cannot be drawn is left out, and ``warn`` told of it. The page of a run that is running is one that a browser loads
    again by itself.
    """
    record, more = RunRecord.read(run, workload), sections or Sections()
    notes = [*record.notes, *more.notes]

    def drawn(what: str, draw: Callable[[], Sequence[T]]) -> Sequence[T]:
        return unless_failing(what, draw, workload, notes)

    shown: list[Picture] = []
    for metric in workload.all_metrics:
        shown += drawn(f"curve of {metric.name}", functools.partial(_curves, record, metric))
    shown += more.pictures
    if record.result:
        shown += _of_test(record, record.result, test, drawn)
    shown += drawn("picture of the seconds", lambda: [_seconds(record)])
    for picture in shown:
        run.inside(PICTURES_FOLDER).write_bytes(f"{picture.name}.png", picture.png)
    operators = drawn("table of operators", functools.partial(_operators, run))
    tables = [*_changed(record), _epochs(record), *more.tables, *operators, *_settings(record)]
    status = f"running: {_epochs_done(record)}" if is_running else _status(record, resume_with)
    page = Page(run.name, status, headlines(record), notes, shown, tables, _REFRESH_S if is_running else 0)
    run.write_text(REPORT_FILE, page.to_html())
    for note in notes:
        warn(note)
    return {picture.name: picture.png for picture in shown}


def _of_test(
    record: RunRecord,
    result: Mapping[str, Any],
    test: Split | None,
    drawn: Callable[[str, Callable[[], Sequence[Picture]]], Sequence[Picture]],
) -> Sequence[Picture]:
    """Return the workload's pictures; where those of the predictions cannot be drawn, the others."""
    draw, rows = record.workload.pictures, record.predictions
    of_all = drawn("pictures of the predictions", lambda: draw(result, rows, test)) if rows else []
    return of_all or drawn("pictures of the test", lambda: draw(result, [], None))


def unless_failing(what: str, draw: Callable[[], Sequence[T]], workload: Workload, notes: list[str]) -> Sequence[T]:
    """Return parts of a page as ``draw`` returns them; where it fails, a note says so, and there are none."""
    assert workload.source is not None
    try:
        parts = list(draw())
        if wrong := [part for part in parts if not isinstance(part, (Picture, Table))]:
            raise TypeError(f"{type(wrong[0]).__name__} is no mnist_ray.workload.figures.Picture")
    except Exception as error:  # files may hold anything, and pictures are drawn by anybody's code
        notes.append(f"no {what}: {with_place(error, workload.source.folder)}")
        return []
    return parts


def _epochs_done(record: RunRecord) -> str:
    return f"{len(record.epochs)} of {record.config['num_epochs']} epochs"


def _status(record: RunRecord, resume_with: str) -> str:
    epochs = _epochs_done(record)
    if record.result is None:
        return f"not finished: {epochs} done, and not tested yet. To go on: {resume_with}"
    nouns = record.workload.nouns
    return f"finished: {epochs}, tested on {record.result.get(f'num_test_{nouns}') or 0:,} {nouns}"


def headlines(record: RunRecord) -> dict[str, str]:
    """Return the most important figures of a run, as people read them."""
    workload, result = record.workload, record.result
    shown = {}
    if result:
        for metric in (*workload.metrics, *workload.all_metrics[:1]):
            shown[f"test {metric.name}"] = _metric(metric, result.get(f"test_{metric.name}"))
    if not math.isnan(record.best_validation):
        shown[f"best validation {workload.monitor.name}"] = workload.monitor.format(record.best_validation)
    if result:
        shown[f"{workload.nouns}/s in training"] = _number(result.get(workload.rate) or math.nan, ",.0f")
        shown["seconds until tested"] = f"{result['seconds']['total']:.1f}"
        shown["workers"] = str(result.get("num_workers", "-"))
    return shown


def _curves(record: RunRecord, metric: Metric) -> list[Picture]:
    per_epoch, total = record.steps_per_epoch, (record.steps[-1]["step"] if record.steps else 0)
    drawn = _training_curves(record, metric.name)
    last = {curve.label: curve.values[-1] for curve in drawn if len(curve.values)}
    ends = "; ".join(f"{label} ends at {metric.format(value)}" for label, value in last.items())
    title = metric.name.capitalize()
    png = curves.curves_of(metric, drawn, per_epoch)
    return [Picture(metric.name, title, f"{title} over {total:,.0f} steps. {ends}", png)]


def _training_curves(record: RunRecord, name: str) -> list[Curve]:
    ends = [row["epoch"] * record.steps_per_epoch for row in record.epochs]
    steps = [row["step"] for row in record.steps]
    values = [row.get(f"train_{name}", math.nan) for row in record.steps]
    return [
        Curve("training", steps, values, {"color": "C0", "linewidth": 1}),
        Curve("validation", ends, record.column(f"val_{name}"), {"color": "C1", "marker": "o", "linestyle": "--"}),
    ]


def _seconds(record: RunRecord) -> Picture:
    if record.result:
        parts = {name: value for name, value in record.result["seconds"].items() if name != "total"}
        caption = "Validation: what was waited for after the last epoch; the rest ran beside the training."
    else:
        columns = {"training": "epoch_s", "validation": "val_s"}
        parts = {name: math.fsum(s for s in record.column(c) if not math.isnan(s)) for name, c in columns.items()}
        caption = "Of the epochs that were finished; validation runs beside the training."
    alt = "Seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in parts.items())
    return Picture("seconds", "Where the seconds went", alt, curves.seconds(parts), caption)


def _epochs(record: RunRecord) -> Table:
    metrics, rate = record.workload.all_metrics, record.workload.rate
    parts = {"train": "training", "val": "validation"}
    columns = ["epoch", *(f"{shown} {metric.name}" for shown in parts.values() for metric in metrics)]
    rows = [
        (
            f"{row['epoch']:.0f}",
            *(metric.format(row.get(f"{part}_{metric.name}", math.nan)) for part in parts for metric in metrics),
            _number(row.get("epoch_s", math.nan), ".2f"),
            _number(row.get(rate, math.nan), ",.0f"),
        )
        for row in record.epochs
    ]
    return Table("Epochs", [*columns, "seconds", f"{record.workload.nouns}/s"], rows)


def _operators(run: RunFolder) -> list[Table]:
    """Return what a profile has found, where one was made."""
    found = run.read_json(OPERATORS_FILE)
    if found is None:
        return []
    rows = [
        (each["operator"], f"{each['ms'] / found['steps']:.3f}", f"{each['part']:.1%}", f"{each['calls']:,}")
        for each in found["operators"]
    ]
    title = f"The most expensive operators in {count(found['steps'], 'step')} of the first worker"
    return [Table(title, ("operator", "ms a step, itself", "of all", "calls"), rows)]


def _changed(record: RunRecord) -> list[Table]:
    """Return what was not left as it is where nobody says anything."""
    changed, defaults = record.workload.changed(record.config), record.workload.defaults
    rows = [(name, str(value), str(defaults[name])) for name, value in changed.items()]
    return [Table("Settings that are not the default", ("setting", "here", "default"), rows)] if rows else []


def _settings(record: RunRecord) -> list[Table]:
    origin = {**record.origin, **record.origin.get("versions", {})}
    return [
        Table("All settings", (), [(name, value_text(value)) for name, value in record.config.items()]),
        Table(
            "Origin",
            (),
            [(name, str(value)) for name, value in origin.items() if name not in ("versions", "metadata", "data")],
        ),
    ]


def _metric(metric: Metric, value: float | None) -> str:
    return "-" if value is None else metric.format(value)


def _number(value: float, how: str) -> str:
    return "-" if math.isnan(value) else format(value, how)


def value_text(value: object) -> str:
    """Return a setting's value as people read it."""
    return "default" if value is None else str(value)
