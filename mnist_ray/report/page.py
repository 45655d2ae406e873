"""A run's report, made from the run's files."""

from __future__ import annotations

import base64
import functools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from mnist_ray.config import TrainConfig, WorkerConfig
from mnist_ray.data.data import Split
from mnist_ray.errors import JobError, UsageError, with_place
from mnist_ray.output import say
from mnist_ray.report import plots
from mnist_ray.report.run_files import ENDED, Run, number_of, settings_of, workload_of
from mnist_ray.schema import REPORT_FILE
from mnist_ray.settings import build, values_of
from mnist_ray.storage import RunFolder
from mnist_ray.text import count, in_words, redact
from mnist_ray.training.events import TIMES
from mnist_ray.training.stopwatch import PARTS
from mnist_ray.workload.base import Picture, Workload
from mnist_ray.workload.calls import data_of, splits_for
from mnist_ray.workload.figures import DONE_ON, IN_WORDS, LOSS, RATE, formatted


@dataclass(frozen=True)
class Table:
    """A table of strings; without ``columns``, it has pairs of a name and a value, and no header."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


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
    record, notes = Run(run, workload), list[str]()
    result, columns = record.result, record.predictions
    num_predicted = len(next(iter(columns.values()), ()))
    if test is not None and columns and len(test) != num_predicted:
        name = f"the {IN_WORDS[record.evaluated]} set"
        notes.append(f"no {workload.nouns} are shown: {name} had {num_predicted:,} and now has {len(test):,}")
        test = None
    drawn = functools.partial(_drawn, workload, notes)
    pictures = drawn("plots of the trials", lambda: plots.trials(record))
    for metric in workload.all_metrics:
        pictures += drawn(f"curve of {metric.name}", functools.partial(plots.of_metric, record, metric))
    if result:
        pictures += drawn("images of the predictions", lambda: workload.pictures(result, test, columns))
    others = [figure for figure in workload.all_figures if "step" in figure.at and figure.over != "mean"]
    logged = [figure for figure in record.logged if "step" in figure.at]
    for figure in (*logged, *others):  # curves of metrics have their validation, too
        pictures += drawn(f"curve of the {figure.label}", functools.partial(plots.of_figure, record, figure))
    page = page_of(
        title=run.name,
        status=_status(record, resume_with),
        headlines=_headlines(record),
        notes=[*result.get("notes", []), *notes],
        pictures=pictures,
        tables=[*_members(record), *_epochs(record), *_time_spent(record), *_settings(record)],
    )
    run.write_text(REPORT_FILE, page)
    for note in notes:
        warn(note)
    return {picture.name: picture.png for picture in pictures}


def _drawn(workload: Workload, notes: list[str], what: str, draw: Callable[[], Iterable[Picture]]) -> list[Picture]:
    """Return the pictures that ``draw`` returns; if it fails, add a note and return none."""
    try:
        pictures = list(draw())
        if wrong := [picture for picture in pictures if not isinstance(picture, Picture)]:
            raise TypeError(f"{type(wrong[0]).__name__} is not a mnist_ray.workload.Picture")
    except (Exception, SystemExit) as error:  # files may hold anything, and workloads draw with their own code
        notes.append(f"no {what}: {with_place(error, workload.source.folder)}")
        return []
    return pictures


def _status(record: Run, resume_with: str) -> str:
    """Return how far a run is. A second line has its date, the size of its model and its workers, if they are known."""
    epochs = f"{int(max(record.column('epoch'), default=0))} of {record.config.get('num_epochs', '?')} epochs"
    if record.table:
        ended = sum(row["state"] in ENDED for row in record.table)
        epochs = f"{ended} of {count(len(record.table), 'run')}"
    known = {"started": "started {!s:.16}", "parameters": "{} parameters", "workers": "{}"}
    about = " · ".join(said.format(record.origin[name]) for name, said in known.items() if name in record.origin)
    if not record.result:
        return f"not finished: {epochs} done, not tested yet. To resume: {resume_with}\n{about}"
    number = formatted(number_of(record.result.get(f"num_{record.evaluated}_examples")), ",.0f")
    return f"finished: {epochs}, {DONE_ON[record.evaluated]} on {number} {record.workload.nouns}\n{about}"


def _headlines(record: Run) -> dict[str, str]:
    """Return the most important values of a run, formatted."""
    workload, result, lines = record.workload, record.result, dict[str, str]()
    for metric in (*workload.metrics, LOSS) if result else ():
        lines[f"{IN_WORDS[record.evaluated]} {metric.name}"] = metric.format(record.metrics[metric.name])
        if spread := result.get("spread", {}).get(f"{record.evaluated}_{metric.name}"):
            low, high = (metric.format(number_of(value)) for value in spread["interval"])
            lines[f"mean {metric.name}, 95 %"] = f"{low} to {high}"
    if not math.isnan(record.best_validation) and (record.evaluated == "test" or not result):
        lines[f"best validation {workload.monitor.name}"] = workload.monitor.format(record.best_validation)
    if result:
        lines[f"{workload.nouns}/s in training"] = formatted(number_of(result.get(RATE)), ",.0f")
        lines[f"seconds until {DONE_ON[record.evaluated]}"] = formatted(
            number_of(result["seconds"].get("total")), ".1f"
        )
        lines["workers"] = str(result.get("num_workers", "-"))
    return lines


def _members(record: Run) -> list[Table]:
    """Return the rows of members.csv, best first, each with its metrics on the evaluated set."""
    if not record.table:
        return []
    metrics, monitor = record.workload.all_metrics, record.workload.monitor

    def rank(member: Run) -> tuple[bool, float]:
        value = float(member.row.get(f"val_{monitor.name}") or math.nan)
        return math.isnan(value), -value if monitor.mode == "max" else value

    names = [name for name in record.table[0] if name not in ("run", "reports")]
    rows = []
    for member in sorted(record.all_members, key=rank):
        tested = [metric.format(member.metrics[metric.name]) for metric in metrics]
        rows.append([*(_cell(member.row[name]) for name in names), *tested])
    columns = [*map(in_words, names), *(f"{IN_WORDS[record.evaluated]} {metric.name}" for metric in metrics)]
    return [Table("Runs, best first", columns, rows)]


def _cell(text: str) -> str:
    """Return a text from a CSV file; a number with five digits."""
    try:
        return f"{float(text):.5g}"
    except ValueError:
        return text


def _epochs(record: Run) -> list[Table]:
    every = (*record.workload.all_figures, *record.logged)
    shown = [figure for figure in every if figure.label and {"epoch", "validation"} & {*figure.at}]
    known = {name for row in record.history for name, value in row.items() if not math.isnan(value)}
    shown = [figure for figure in shown if figure.over == "last" or figure.name in known]  # speed and time always
    rows = [
        (f"{row['epoch']:.6g}", *(formatted(row.get(figure.name, math.nan), figure.form) for figure in shown))
        for row in record.history
    ]
    return [Table("Epochs", ["epoch", *(figure.label for figure in shown)], rows)] if rows else []


def _time_spent(record: Run) -> list[Table]:
    """Return the mean seconds of a worker by part."""
    seconds = {
        part: figure.join(row.get(figure.name, math.nan) for row in record.steps)
        for part, figure in zip(PARTS.values(), TIMES, strict=True)
    }
    total = math.fsum(value for value in seconds.values() if value > 0)
    rows = [(part, f"{value:.1f}", f"{value / total:.1%}") for part, value in seconds.items() if value > 0]
    return [Table("Where the time went", ("part", "seconds of a worker", "share"), rows)] if rows else []


def _settings(record: Run) -> list[Table]:
    """Return the settings, those that differ from the workload's defaults first, and the origin."""
    defaults = {**values_of(WorkerConfig()), **record.workload.defaults}
    defaults = json.loads(json.dumps(defaults))  # tuples are lists in config.json
    used = {name: record.config[name] for name in record.config if name not in record.origin.get("unused_settings", ())}
    changed = {name: value for name, value in used.items() if value != defaults.get(name, value)}
    origin = {**record.origin, **record.origin.get("versions", {})}
    said = [(name, str(value)) for name, value in origin.items() if not isinstance(value, (dict, list))]
    return [
        Table("Changed settings", (), [(name, f"{changed[name]} (default: {defaults[name]})") for name in changed]),
        Table("Other settings", (), [(name, str(value)) for name, value in used.items() if name not in changed]),
        Table("Origin", (), said),
    ]


def write_again(run: RunFolder, reference: str | None, storage_path: str, resume_with: str) -> None:
    """Rewrite the report of a run. Raises UsageError and JobError."""
    workload, test = workload_of(run, reference, storage_path), None
    try:
        test = splits_for(workload, data_of(workload), build(TrainConfig, settings_of(run))).test
    except (UsageError, JobError) as error:
        say(f"no {workload.nouns} are shown: {error}")
    write(run, workload, resume_with, test, lambda note: say(f"note {note}"))
    say(f"report {run.inside(REPORT_FILE).uri}")
