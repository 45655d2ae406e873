"""The page that shows how a run went, made from what the run has left on disk; and one that compares several."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import numpy as np

from mnist_ray import config as settings
from mnist_ray.config import DataConfig, LookupConfig
from mnist_ray.display import pictures
from mnist_ray.display.history import METRICS_FILE, STEPS_FILE, read_csv, read_predictions
from mnist_ray.display.pictures import Curve
from mnist_ray.errors import JobError, UsageError
from mnist_ray.storage import (
    CONFIG_FILE,
    ORIGIN_FILE,
    REPORT_FILE,
    RESULT_FILE,
    TRIALS_FILE,
    RunFolder,
    find_run,
    write_file,
)
from mnist_ray.sweeps.search import TRIAL_COLUMNS, TrialTable, row_of
from mnist_ray.workload.mnist import idx as data
from mnist_ray.workload.mnist.idx import Split

PICTURES_FOLDER = "pictures"
_COMPARED = (
    "test accuracy",
    "test loss",
    "best validation accuracy",
    "images/s in training",
    "seconds until tested",
    "workers",
)
_EPOCH_COLUMNS = (
    "epoch",
    "training loss",
    "training accuracy",
    "validation loss",
    "validation accuracy",
    "seconds",
    "images/s",
)
_NUM_RANDOM, _NUM_WRONG, _NUM_MISTAKES = 24, 6, 30


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder tells of it."""

    run: RunFolder
    config: dict[str, Any]
    origin: dict[str, Any]
    """Versions, command line, commit."""
    epochs: list[dict[str, float]]
    """Rows of metrics.csv; NaN where a figure is not there (yet)."""
    steps: list[dict[str, float]]
    """Rows of steps.csv."""
    result: dict[str, Any] | None
    """None where the run has not finished."""
    predictions: np.ndarray | None
    """(test images, 3): label, prediction, probability; None where the run has not finished."""
    trials: TrialTable | None
    """None where the run is no sweep."""

    @classmethod
    def read(cls, run: RunFolder) -> RunRecord:
        """Read a run's files. Raises UsageError where they are not there or damaged."""
        config, result = run.read_text(CONFIG_FILE), run.read_text(RESULT_FILE)
        trials = run.read_text(TRIALS_FILE)
        if config is None:
            raise UsageError(f"{run.uri} is no run: it has no {CONFIG_FILE}")
        values = settings.parse_config(config, run.inside(CONFIG_FILE).uri, settings.RUN_SETTINGS)
        job = settings.build_job(values)
        try:
            return cls(
                run,
                settings.values_of(job.train, job.data, job.workers),
                json.loads(run.read_text(ORIGIN_FILE) or "{}"),
                _numbers(read_csv(run, METRICS_FILE)),
                _numbers(read_csv(run, STEPS_FILE)),
                None if result is None else json.loads(result),
                read_predictions(run),
                None if trials is None else TrialTable.from_csv(trials),
            )
        except (ValueError, TypeError) as error:
            raise UsageError(f"run {run.uri} has a damaged file: {error}") from error

    def figures(self, name: str) -> list[float]:
        """Return a column of metrics.csv."""
        return [row[name] for row in self.epochs]

    @property
    def steps_per_epoch(self) -> float:
        """Steps of an epoch; 1 where none was trained."""
        return self.steps[-1]["step"] / self.steps[-1]["epoch"] if self.steps else 1.0

    @property
    def best_val_accuracy(self) -> float:
        """NaN where nothing was validated."""
        return max((a for a in self.figures("val_accuracy") if not math.isnan(a)), default=math.nan)


@dataclass(frozen=True)
class Picture:
    """A picture with what stands around it."""

    name: str
    """Its file, without the suffix."""
    title: str
    alt: str
    png: bytes
    caption: str = ""
    is_photo: bool = False
    """Shows images of the data, which dark mode is not to invert."""

    @property
    def base64(self) -> str:
        """The content as a ``data:`` URL takes it."""
        return base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Table:
    """A table of texts; without columns it has no head."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


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
        environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
        return environment.get_template("report.html.jinja").render(page=self)


def _numbers(rows: Sequence[Mapping[str, str]]) -> list[dict[str, float]]:
    return [{name: float(value) if value else math.nan for name, value in row.items()} for row in rows]


def write(run: RunFolder, test: Split | None) -> list[Picture]:
    """Write a run's report.html and its pictures as PNGs; return these. Raises UsageError and JobError.

    ``test`` are the images that ``predictions.csv`` is about; without them the pictures of predictions are left out.
    """
    record = RunRecord.read(run)
    shown = _pictures(record, test)
    for picture in shown:
        run.inside(PICTURES_FOLDER).write_bytes(f"{picture.name}.png", picture.png)
    page = Page(run.name, _status(record), _facts(record), shown, _tables(record))
    run.write_text(REPORT_FILE, page.to_html())
    return shown


def _status(record: RunRecord) -> str:
    epochs = f"{len(record.epochs)} of {record.config['num_epochs']} epochs"
    if record.result is None:
        command = record.run.resume_command("train" if record.trials is None else "tune")
        return f"not finished: {epochs} done, and not tested yet. To go on: {command}"
    return f"finished: {epochs}, tested on {record.result['num_test_images']:,} images"


def _facts(record: RunRecord) -> dict[str, str]:
    facts = {}
    if record.result:
        facts["test accuracy"] = f"{record.result['test_accuracy']:.2%}"
        facts["test loss"] = f"{record.result['test_loss']:.4f}"
    if not math.isnan(record.best_val_accuracy):
        facts["best validation accuracy"] = _percent(record.best_val_accuracy)
    if record.result:
        facts["images/s in training"] = f"{record.result['images_per_s']:,.0f}"
        facts["seconds until tested"] = f"{record.result['seconds']['total']:.1f}"
        facts["workers"] = str(record.result["num_workers"])
    return facts


def _pictures(record: RunRecord, test: Split | None) -> list[Picture]:
    shown = _curves(record)
    if record.trials is not None:
        png = pictures.sweep(record.trials, record.config["num_epochs"])
        alt = (
            f"Validation accuracy over learning rate of {len(record.trials.by_point)} trials; the table has all figures"
        )
        shown.append(Picture("sweep", "Trials", alt, png, "Hollow: stopped early. Ringed: the best configuration."))
    if record.result:
        shown += _test_pictures(record.result)
    if record.predictions is not None and test is not None and len(test) == len(record.predictions):
        shown += _prediction_pictures(record.predictions, test.images)
    return [*shown, _seconds(record)]


def _curves(record: RunRecord) -> list[Picture]:
    per_epoch, total = record.steps_per_epoch, (record.steps[-1]["step"] if record.steps else 0)
    shown = []
    for name, title, draw in (
        ("loss", "Loss", pictures.loss_curves),
        ("accuracy", "Accuracy", pictures.accuracy_curves),
    ):
        curves = _training_curves(record, name)
        last = {curve.label: curve.values[-1] for curve in curves if len(curve.values)}
        ends = "; ".join(f"{label} ends at {_figure(name, value)}" for label, value in last.items())
        alt = f"{title} over {total:,.0f} steps. {ends}"
        shown.append(Picture(name, title, alt, draw(curves, per_epoch)))
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


def _test_pictures(result: Mapping[str, Any]) -> list[Picture]:
    counts = np.array(result["confusion_matrix"])
    mistakes = counts * ~np.eye(len(counts), dtype=bool)
    label, prediction = np.unravel_index(mistakes.argmax(), mistakes.shape)
    most = f"most often {label} was taken for {prediction}, {mistakes.max()} times" if mistakes.any() else "no mistakes"
    accuracies = [math.nan if a is None else a for a in result["test_accuracy_per_class"]]
    by_class = ", ".join(f"{label}: {_percent(accuracy)}" for label, accuracy in enumerate(accuracies))
    return [
        Picture(
            "confusion",
            "Confusion matrix of the test set",
            f"Confusion matrix: {mistakes.sum()} mistakes among {counts.sum():,} images; {most}",
            pictures.confusion_matrix(counts),
            "The stronger the shade, the larger a part of the label's images; right ones have none.",
        ),
        Picture(
            "classes",
            "Accuracy per class on the test set",
            f"Accuracy per class: {by_class}",
            pictures.accuracy_per_class(accuracies),
        ),
    ]


def _prediction_pictures(predictions: np.ndarray, images: np.ndarray) -> list[Picture]:
    labels, predicted = predictions[:, 0].astype(int), predictions[:, 1].astype(int)
    probabilities, is_right = predictions[:, 2], labels == predicted
    rng = np.random.default_rng(0)
    some = rng.choice(len(labels), min(_NUM_RANDOM, len(labels)), replace=False)
    wrong = np.flatnonzero(~is_right)
    chosen = np.concatenate([some, rng.permutation(np.setdiff1d(wrong, some))[:_NUM_WRONG]])
    surest = wrong[np.argsort(-probabilities[wrong], kind="stable")][:_NUM_MISTAKES]
    captions = [str(predicted[i]) if is_right[i] else f"{predicted[i]}, is {labels[i]}" for i in chosen]
    shown = [
        Picture(
            "predictions",
            "Predictions",
            f"{len(chosen)} test images with their predictions: "
            + "; ".join(f"{labels[i]} taken for {predicted[i]}" for i in chosen),
            pictures.digits(images[chosen], captions, is_right[chosen]),
            f"{len(some)} test images drawn at random, then mistakes. ✓ right, ✗ wrong.",
            is_photo=True,
        )
    ]
    if len(surest):
        captions = [f"{predicted[i]}, is {labels[i]}" for i in surest]
        shown.append(
            Picture(
                "mistakes",
                "The most confident mistakes",
                "The surest wrong predictions: "
                + "; ".join(f"{labels[i]} taken for {predicted[i]} at {probabilities[i]:.0%}" for i in surest),
                pictures.digits(images[surest], captions, is_right[surest]),
                f"From {probabilities[surest[0]]:.1%} sure down to {probabilities[surest[-1]]:.1%}.",
                is_photo=True,
            )
        )
    return shown


def _tables(record: RunRecord) -> list[Table]:
    epochs = [
        (
            f"{row['epoch']:.0f}",
            _figure("loss", row["train_loss"]),
            _percent(row["train_accuracy"]),
            _figure("loss", row["val_loss"]),
            _percent(row["val_accuracy"]),
            f"{row['epoch_s']:.2f}",
            f"{row['images_per_s']:,.0f}",
        )
        for row in record.epochs
    ]
    tables = [Table("Epochs", _EPOCH_COLUMNS, epochs)]
    if record.trials is not None:
        rows = [row_of(trial, record.config["num_epochs"]) for trial in record.trials.ranked]
        tables.append(Table("Trials, best first", TRIAL_COLUMNS, rows))
    tables.append(Table("Settings", (), [(name, _value(value)) for name, value in record.config.items()]))
    origin = {**record.origin, **record.origin.get("versions", {})}
    tables.append(Table("Origin", (), [(name, str(value)) for name, value in origin.items() if name != "versions"]))
    return tables


def make_report(flags: Mapping[str, Any]) -> None:
    """Make the report of one run again, or a page of several, as ``jobs/report.py`` is told.

    Raises UsageError and JobError.
    """
    storage_path = settings.build(LookupConfig, flags).storage_path
    runs = [find_run(given, storage_path) for given in flags["runs"] or [None]]
    if len(runs) > 1:
        output = flags.get("output", "comparison.html")
        write_file(output, compare([RunRecord.read(run) for run in runs]).encode("utf-8"))
        print(f"report {output}")
        return
    if "output" in flags:
        raise UsageError("--output is for the page of several runs; that of one is in the run's folder")
    config = settings.build(DataConfig, RunRecord.read(runs[0]).config)
    test = None
    try:
        test = data.find(config).load("test")
    except (UsageError, JobError) as error:
        print(f"no pictures of predictions: {error}")
    write(runs[0], test)
    print(f"report {runs[0].inside(REPORT_FILE).uri}")


def compare(records: Sequence[RunRecord]) -> str:
    """Return a page that shows several runs side by side."""
    names = [record.run.name for record in records]
    rows = [(record.run.name, *_comparison_row(record)) for record in records]
    tables = [Table("Runs", ("run", *_COMPARED), rows)]
    keys = [key for key in records[0].config if len({_value(record.config.get(key)) for record in records}) > 1]
    settings_that_differ = [(key, *(_value(record.config.get(key)) for record in records)) for key in keys]
    if settings_that_differ:
        tables.append(Table("Settings that differ", ("setting", *names), settings_that_differ))
    tested = [record for record in records if record.result]
    if tested:
        per_class = zip(*(record.result["test_accuracy_per_class"] for record in tested if record.result), strict=False)
        classes = [(label, *(_percent(a) for a in accuracies)) for label, accuracies in enumerate(per_class)]
        tables.append(Table("Accuracy per class", ("class", *(record.run.name for record in tested)), classes))
    shown = [
        Picture(
            "loss",
            "Loss in training",
            f"Training loss of {', '.join(names)}; the table has the ends",
            pictures.loss_curves(_curves_of(records, "train_loss"), None),
        ),
        Picture(
            "accuracy",
            "Validation accuracy",
            f"Validation accuracy of {', '.join(names)}; the table has the best",
            pictures.accuracy_curves(_curves_of(records, "val_accuracy"), None),
        ),
    ]
    return Page(f"{len(records)} runs", "side by side", {}, shown, tables).to_html()


def _comparison_row(record: RunRecord) -> list[str]:
    facts = _facts(record)
    return [facts.get(name, "-") for name in _COMPARED]


def _curves_of(records: Sequence[RunRecord], name: str) -> list[Curve]:
    curves = []
    for number, record in enumerate(records):
        style = {
            "color": f"C{number % 10}",
            "marker": pictures.MARKERS[number % 8],
            "linestyle": ("-", "--", ":")[number % 3],
        }
        curves.append(Curve(record.run.name, record.figures("epoch"), record.figures(name), style))
    return curves


def _figure(name: str, value: float) -> str:
    return _percent(value) if name == "accuracy" else "-" if math.isnan(value) else f"{value:.4f}"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None or math.isnan(fraction) else f"{fraction:.2%}"


def _value(value: object) -> str:
    return "default" if value is None else str(value)
