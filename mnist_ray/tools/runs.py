"""Lists the runs in a storage: ``mnist-ray runs``. Reads their files only: code that came with a run is not loaded."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table

from mnist_ray.config import OutputConfig, RunsConfig
from mnist_ray.errors import JobError, UsageError
from mnist_ray.job.job import resume_command
from mnist_ray.job.lease import owner_of
from mnist_ray.output import finite, say
from mnist_ray.report.console import LOG_WIDTH
from mnist_ray.report.run_files import Run, number_of
from mnist_ray.runs import is_sweep
from mnist_ray.storage import (
    CONFIG_FILE,
    RunFolder,
    in_one_line,
    locate,
)
from mnist_ray.text import clock_time, count, redact
from mnist_ray.workload.figures import formatted


@dataclass(frozen=True)
class ListedRun:
    """A run, as its files describe it."""

    name: str
    kind: str  # train or tune
    state: str  # finished, running on a host, unfinished (interrupted, killed or failed), or damaged
    progress: str
    metrics: dict[str, float]  # on the test set; of an unfinished run, on the validation set
    age_s: float  # since the start
    resume_with: str  # empty unless unfinished
    forms: dict[str, str] = field(default_factory=dict)  # how to print the metrics
    reason: str = ""  # if it is damaged


def runs(storage_path: str, config: RunsConfig) -> None:
    """Print the newest runs as a table, or as a JSON object on each line. Raises UsageError and JobError."""
    folders = [locate(storage_path, name) for name in _names(storage_path)]
    with in_one_line(f"cannot read {storage_path}"):
        started = {folder.name: _started(folder) for folder in folders}
    newest = sorted((folder for folder in folders if started[folder.name]), key=lambda folder: -started[folder.name])
    listed = [_listed(folder, time.time() - started[folder.name]) for folder in newest[: config.count]]
    if config.json:
        for run in listed:
            say(json.dumps(finite({name: value for name, value in asdict(run).items() if name != "forms"})))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("run", "kind", "state", "progress", "metrics", "age"):
        table.add_column(column, no_wrap=column != "metrics")
    for run in listed:
        metrics = [f"{name} {formatted(value, run.forms.get(name, 'number'))}" for name, value in run.metrics.items()]
        cells = (run.name, run.kind, run.state, run.progress, ", ".join(metrics) or run.reason, clock_time(run.age_s))
        table.add_row(*map(redact, cells))
    width = None if sys.stdout.isatty() else LOG_WIDTH
    Console(width=width, soft_wrap=True, highlight=False, markup=False, emoji=False).print(table)
    for run in listed:
        if run.resume_with:
            say(f"to resume {run.name}: {run.resume_with}")
    say(f"{count(len(listed), 'run')} of {len(newest)} in {storage_path}")


def _names(storage_path: str) -> Iterator[str]:
    storage = locate(storage_path, "")
    with in_one_line(f"cannot read {storage_path}"):
        if not storage.exists():
            raise UsageError(f"{storage_path} does not exist; name the folder or URI of your runs with --storage-path")
        yield from storage.subfolders()


def _started(folder: RunFolder) -> float:
    """Return when the run's settings were written, in seconds since 1970; 0 if the folder is no run of this user."""
    try:
        info = folder.info(CONFIG_FILE)
    except PermissionError:
        return 0.0
    return info.mtime_ns / 1e9 if info.is_file and info.mtime_ns else 0.0


def _listed(folder: RunFolder, age_s: float) -> ListedRun:
    kind = "train"
    try:
        with in_one_line(f"cannot read {folder.uri}"):
            run = Run(folder)
            kind = "tune" if is_sweep(run.config) else kind
            result, progress = run.result, _progress(run)
            owner = None if result else owner_of(folder)
        values, forms, prefix = result, result.get("formats", {}), "test_"
        if not result and (rows := [row for row in run.history if not math.isnan(row.get("val_loss", math.nan))]):
            values, prefix = rows[-1], "val_"
        numbers = {name: number_of(values[name]) for name in values if name.startswith(prefix)}
        metrics = {name: value for name, value in numbers.items() if value == value and name != "val_s"}
    except (JobError, ValueError) as error:
        return ListedRun(folder.name, kind, "damaged", "", {}, age_s, "", reason=str(error))
    state = "finished" if result else f"running on {owner}" if owner else "unfinished"
    output = OutputConfig(run_name=folder.name, storage_path=folder.storage_path)
    resume_with = resume_command(kind, output) if state == "unfinished" else ""
    return ListedRun(folder.name, kind, state, progress, metrics, age_s, resume_with, forms)


def _progress(run: Run) -> str:
    """Return the epochs that a run has trained, or the members of a job of many runs."""
    if run.table:
        return count(len(run.table), "run")
    return f"epoch {len(run.history)}/{run.config.get('num_epochs', '?')}"
