"""The page that shows how a run went, made from what the run has left on disk; and one that compares several."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from mnist_ray import settings
from mnist_ray.display import pictures
from mnist_ray.display.history import METRICS_FILE, PREDICTIONS_FILE, STEPS_FILE, read_csv
from mnist_ray.display.pictures import Curve
from mnist_ray.drawing import MARKERS, Picture, Table
from mnist_ray.errors import UsageError
from mnist_ray.screen import masked
from mnist_ray.storage import CONFIG_FILE, ORIGIN_FILE, REPORT_FILE, RESULT_FILE, RunFolder
from mnist_ray.workload.data import Part
from mnist_ray.workload.interface import Metric, Workload

PICTURES_FOLDER = "pictures"


@dataclass(frozen=True)
class Sections:
    """What a report shows besides: a sweep's trials."""

    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder tells of it."""

    run: RunFolder
    workload: Workload
    config: dict[str, Any]
    origin: dict[str, Any]
    """Versions, command line, commit."""
    epochs: list[dict[str, float]]
    """Rows of metrics.csv; NaN where a figure is not there (yet)."""
    steps: list[dict[str, float]]
    """Rows of steps.csv."""
    result: dict[str, Any] | None
    """None where the run has not finished."""
    predictions: list[dict[str, str]]
    """Rows of predictions.csv; none where the run has not finished."""

    @classmethod
    def read(cls, run: RunFolder, workload: Workload) -> RunRecord:
        """Read a run's files. Raises UsageError where they are not there or damaged."""
        config, result = read_config(run), run.read_text(RESULT_FILE)
        try:
            return cls(
                run,
                workload,
                config,
                json.loads(run.read_text(ORIGIN_FILE) or "{}"),
                _numbers(read_csv(run, METRICS_FILE)),
                _numbers(read_csv(run, STEPS_FILE)),
                None if result is None else json.loads(result),
                read_csv(run, PREDICTIONS_FILE),
            )
        except (ValueError, TypeError) as error:
            raise UsageError(f"run {run.uri} has a damaged file: {error}") from error

    def figures(self, name: str) -> list[float]:
        """Return a column of metrics.csv; NaN where it has none of that name."""
        return [row.get(name, math.nan) for row in self.epochs]

    @property
    def steps_per_epoch(self) -> float:
        """Steps of an epoch; 1 where none was trained."""
        return self.steps[-1]["step"] / self.steps[-1]["epoch"] if self.steps else 1.0

    @property
    def best_validation(self) -> float:
        """Of the workload's criterion; NaN where nothing was validated."""
        criterion = self.workload.criterion
        known = [value for value in self.figures(f"val_{criterion.name}") if not math.isnan(value)]
        return (max if criterion.mode == "max" else min)(known, default=math.nan)


@dataclass(frozen=True)
class Page:
    """What the template is filled with."""

    title: str
    status: str
    facts: Mapping[str, str]
    pictures: Sequence[Picture] = field(default_factory=list)
    tables: Sequence[Table] = field(default_factory=list)

    def to_html(self) -> str:
        """Return the page: one file that needs no other and no network."""
        loader = jinja2.PackageLoader("mnist_ray.display")
        environment = jinja2.Environment(
            loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, finalize=_without_secrets
        )
        return environment.get_template("report.html.jinja").render(page=self)


def _without_secrets(value: object) -> object:
    return masked(value) if isinstance(value, str) else value


def read_config(run: RunFolder) -> dict[str, Any]:
    """Return the settings of a run. Raises UsageError where it has none."""
    config = run.read_text(CONFIG_FILE)
    if config is None:
        raise UsageError(f"{run.uri} is no run: it has no {CONFIG_FILE}")
    return settings.parse_config(config, run.inside(CONFIG_FILE).uri)


def _numbers(rows: Sequence[Mapping[str, str]]) -> list[dict[str, float]]:
    return [{name: float(value) if value else math.nan for name, value in row.items()} for row in rows]


def write(
    run: RunFolder, workload: Workload, resume_with: str, test: Part | None, sections: Sections | None = None
) -> dict[str, bytes]:
    """Write a run's report.html and its pictures as PNGs; return these by name. Raises UsageError and JobError.

    ``test`` are the examples that predictions.csv is about; without them there are no pictures of predictions.
    """
    record, more = RunRecord.read(run, workload), sections or Sections()
    shown = [*_curves(record), *more.pictures]
    if record.result:
        shown += workload.pictures(record.result, record.predictions, test)
    shown.append(_seconds(record))
    for picture in shown:
        run.inside(PICTURES_FOLDER).write_bytes(f"{picture.name}.png", picture.png)
    tables = [_epochs(record), *more.tables, *_settings(record)]
    run.write_text(REPORT_FILE, Page(run.name, _status(record, resume_with), facts(record), shown, tables).to_html())
    return {picture.name: picture.png for picture in shown}


def _status(record: RunRecord, resume_with: str) -> str:
    epochs = f"{len(record.epochs)} of {record.config['num_epochs']} epochs"
    if record.result is None:
        return f"not finished: {epochs} done, and not tested yet. To go on: {resume_with}"
    nouns = record.workload.nouns
    return f"finished: {epochs}, tested on {record.result[f'num_test_{nouns}']:,} {nouns}"


def facts(record: RunRecord) -> dict[str, str]:
    """Return the most important figures of a run, as people read them."""
    workload, result = record.workload, record.result
    shown = {}
    if result:
        for metric in (*workload.metrics, *workload.figures[:1]):
            shown[f"test {metric.name}"] = _metric(metric, result[f"test_{metric.name}"])
    if not math.isnan(record.best_validation):
        shown[f"best validation {workload.criterion.name}"] = workload.criterion.shown(record.best_validation)
    if result:
        shown[f"{workload.nouns}/s in training"] = f"{result[workload.rate]:,.0f}"
        shown["seconds until tested"] = f"{result['seconds']['total']:.1f}"
        shown["workers"] = str(result["num_workers"])
    return shown


def _curves(record: RunRecord) -> list[Picture]:
    per_epoch, total = record.steps_per_epoch, (record.steps[-1]["step"] if record.steps else 0)
    shown = []
    for metric in record.workload.figures:
        curves = _training_curves(record, metric.name)
        last = {curve.label: curve.values[-1] for curve in curves if len(curve.values)}
        ends = "; ".join(f"{label} ends at {metric.shown(value)}" for label, value in last.items())
        title = metric.name.capitalize()
        png = pictures.curves_of(metric, curves, per_epoch)
        shown.append(Picture(metric.name, title, f"{title} over {total:,.0f} steps. {ends}", png))
    return shown


def _training_curves(record: RunRecord, name: str) -> list[Curve]:
    ends = [row["epoch"] * record.steps_per_epoch for row in record.epochs]
    steps, values = [row["step"] for row in record.steps], [row[f"train_{name}"] for row in record.steps]
    return [
        Curve("training", steps, values, {"color": "C0", "linewidth": 1}),
        Curve(
            "training, mean of epoch",
            ends,
            record.figures(f"train_{name}"),
            {"color": "C0", "marker": "s", "linestyle": "none"},
        ),
        Curve("validation", ends, record.figures(f"val_{name}"), {"color": "C1", "marker": "o", "linestyle": "--"}),
    ]


def _seconds(record: RunRecord) -> Picture:
    if record.result:
        parts = {name: value for name, value in record.result["seconds"].items() if name != "total"}
        caption = "Validation: what was waited for after the last epoch; the rest ran beside the training."
    else:
        columns = {"training": "epoch_s", "validation": "val_s"}
        parts = {name: math.fsum(s for s in record.figures(c) if not math.isnan(s)) for name, c in columns.items()}
        caption = "Of the epochs that were finished; validation runs beside the training."
    alt = "Seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in parts.items())
    return Picture("seconds", "Where the seconds went", alt, pictures.seconds(parts), caption)


def _epochs(record: RunRecord) -> Table:
    figures, rate = record.workload.figures, record.workload.rate
    parts = {"train": "training", "val": "validation"}
    columns = ["epoch", *(f"{shown} {metric.name}" for shown in parts.values() for metric in figures)]
    rows = [
        (
            f"{row['epoch']:.0f}",
            *(metric.shown(row[f"{part}_{metric.name}"]) for part in parts for metric in figures),
            f"{row['epoch_s']:.2f}",
            f"{row[rate]:,.0f}",
        )
        for row in record.epochs
    ]
    return Table("Epochs", [*columns, "seconds", f"{record.workload.nouns}/s"], rows)


def _settings(record: RunRecord) -> list[Table]:
    origin = {**record.origin, **record.origin.get("versions", {})}
    return [
        Table("Settings", (), [(name, _value(value)) for name, value in record.config.items()]),
        Table(
            "Origin", (), [(name, str(value)) for name, value in origin.items() if name not in ("versions", "facts")]
        ),
    ]


def compare(records: Sequence[RunRecord]) -> str:
    """Return a page that shows several runs side by side."""
    names, shown_facts = [record.run.name for record in records], [facts(record) for record in records]
    columns = list(dict.fromkeys(name for some in shown_facts for name in some))
    rows = [
        (name, *(some.get(column, "-") for column in columns)) for name, some in zip(names, shown_facts, strict=True)
    ]
    tables = [Table("Runs", ("run", *columns), rows)]
    keys = list(dict.fromkeys(key for record in records for key in record.config))
    differing = [key for key in keys if len({_value(record.config.get(key)) for record in records}) > 1]
    if differing:
        rows = [(key, *(_value(record.config.get(key)) for record in records)) for key in differing]
        tables.append(Table("Settings that differ", ("setting", *names), rows))
    tables += _per_class([record for record in records if record.result])
    common = [m for m in records[0].workload.figures if all(m in record.workload.figures for record in records)]
    pages = [Picture("loss", "Loss in training", f"Training loss of {', '.join(names)}; the table has the ends",
                     pictures.curves_of(common[0], _curves_over(records, "train_loss"), None))]  # fmt: skip
    for metric in common[1:]:
        title = f"Validation {metric.name}"
        png = pictures.curves_of(metric, _curves_over(records, f"val_{metric.name}"), None)
        pages.append(Picture(metric.name, title, f"{title} of {', '.join(names)}; the table has the best", png))
    return Page(f"{len(records)} runs", "side by side", {}, pages, tables).to_html()


def _per_class(tested: Sequence[RunRecord]) -> list[Table]:
    """Return the accuracies of each class, where the runs have the same classes."""
    accuracies = [record.result.get("test_accuracy_per_class", []) for record in tested if record.result]
    classes = [
        record.workload.facts.get("class_names", range(len(a))) for record, a in zip(tested, accuracies, strict=True)
    ]
    if not tested or not accuracies[0] or any(list(names) != list(classes[0]) for names in classes):
        return []
    metric = tested[0].workload.criterion
    rows = [
        (name, *(_metric(metric, a) for a in row))
        for name, row in zip(classes[0], zip(*accuracies, strict=True), strict=True)
    ]
    return [Table("Accuracy per class", ("class", *(record.run.name for record in tested)), rows)]


def _curves_over(records: Sequence[RunRecord], name: str) -> list[Curve]:
    curves = []
    for number, record in enumerate(records):
        style = {
            "color": f"C{number % 10}",
            "marker": MARKERS[number % 8],
            "linestyle": ("-", "--", ":")[number % 3],
        }
        curves.append(Curve(record.run.name, record.figures("epoch"), record.figures(name), style))
    return curves


def _metric(metric: Metric, value: float | None) -> str:
    return "-" if value is None else metric.shown(value)


def _value(value: object) -> str:
    return "default" if value is None else str(value)
