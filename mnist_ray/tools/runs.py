"""Lists the runs in a storage: ``mnist-ray runs``. Reads their files only: code that came with a run is not loaded."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from mnist_ray.config import OutputConfig, RunsConfig
from mnist_ray.errors import JobError, UsageError
from mnist_ray.flags import setting_in
from mnist_ray.job.job import resume_command
from mnist_ray.job.lease import owner_of
from mnist_ray.output import say
from mnist_ray.report.console import LOG_WIDTH
from mnist_ray.report.run_files import Run, number_of
from mnist_ray.runs import is_sweep
from mnist_ray.schema import CONFIG_FILE
from mnist_ray.storage import STORAGE_ERRORS, RunFolder, in_one_line, locate
from mnist_ray.text import clock_time, count, did_you_mean, redact
from mnist_ray.workload.figures import formatted

_COLUMNS = ("name", "kind", "state", "progress", "about", "age")


def runs(storage_path: str, choice: RunsConfig) -> dict[str, Any]:
    """Print runs as a table, the newest or the best first; return what their files say. Raises UsageError, JobError."""
    storage = locate(storage_path, "")
    with in_one_line(f"cannot read {storage_path}"):
        if not storage.exists():
            raise UsageError(f"{storage_path} does not exist; name the folder or URI of your runs with --storage-path")
        started = {name: _started(storage.inside(name)) for name in storage.subfolders()}
    newest = sorted(filter(started.get, started), key=lambda name: -started[name])
    if choice.where:
        wanted = dict(setting_in(text, "--where") for text in choice.where)
        newest = _chosen(storage, newest, wanted)
    number = len(newest) if choice.sort else choice.count
    listed = [{**_described(locate(storage_path, name)), "started": started[name]} for name in newest[:number]]
    if choice.sort:
        listed = _sorted(listed, choice.sort)[: choice.count]
    table = Table(*_COLUMNS, box=None, padding=(0, 2, 0, 0))
    for run in listed:
        age = clock_time(time.time() - run["started"])
        table.add_row(*(redact({**run, "age": age}[column]) for column in _COLUMNS))
    width = None if sys.stdout.isatty() else LOG_WIDTH
    Console(width=width, soft_wrap=True, highlight=False, markup=False, emoji=False).print(table)
    for run in listed:
        if run["resume_with"]:
            say(f"to resume {run['name']}: {run['resume_with']}")
    say(f"{count(len(listed), 'run')} of {len(newest)} in {storage_path}")
    return {"runs": listed}


def _chosen(storage: RunFolder, names: list[str], wanted: dict[str, Any]) -> list[str]:
    """Return the runs whose settings have the wanted values. Raises UsageError if no run has such a setting."""
    settings = dict[str, dict[str, Any]]()
    for name in names:
        with contextlib.suppress(JobError, *STORAGE_ERRORS):
            settings[name] = Run(storage.inside(name)).config
    known = {setting for of_run in settings.values() for setting in of_run}
    if unknown := [name for name in wanted if name not in known]:
        raise UsageError(f"--where: no run has a setting {unknown[0]}{did_you_mean(unknown[0], known)}")
    return [name for name, of_run in settings.items() if wanted.items() <= of_run.items()]


def _sorted(listed: list[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """Return the runs by a metric, best first, and then those without it. Raises UsageError if no run has it.

    ``by`` is a name such as ``accuracy`` or ``test_accuracy``, perhaps with ``:min`` or ``:max``. Without these, high
    fractions and low numbers are best.
    """
    name, _, mode = by.partition(":")
    if mode not in ("", "min", "max"):
        raise UsageError(f"--sort {by}: write NAME:min or NAME:max")
    known = {metric for run in listed for metric in run["metrics"]}
    names = [each for each in (name, f"test_{name}", f"val_{name}") if each in known]
    if not names:
        raise UsageError(f"--sort {by}: no run has this metric{did_you_mean(name, known)}")
    mode = mode or ("max" if any(run["forms"].get(names[0]) == "fraction" for run in listed) else "min")

    def rank(run: dict[str, Any]) -> float:
        value = next((run["metrics"][each] for each in names if each in run["metrics"]), math.inf)
        return -value if mode == "max" and value < math.inf else value

    return sorted(listed, key=rank)


def _started(folder: RunFolder) -> float:
    """Return when the run's settings were written, in seconds since 1970; 0 if the folder is no run of this user."""
    try:
        info = folder.info(CONFIG_FILE)
    except PermissionError:
        return 0.0
    return info.mtime_ns / 1e9 if info.is_file and info.mtime_ns else 0.0


def _described(folder: RunFolder) -> dict[str, Any]:
    """Return a run's state (finished, running on a host, unfinished or damaged), progress, metrics and so on."""
    run = Run(folder)
    described = {"name": folder.name, "kind": "train", "state": "damaged", "progress": "", "metrics": {}, "forms": {}}
    try:
        with in_one_line(f"cannot read {folder.uri}"):
            kind = "tune" if is_sweep(run.config) else "train"
            owner = None if run.result else owner_of(folder)
            metrics, forms = _metrics(run), run.result.get("formats", {})
            progress = f"epoch {int(max(run.column('epoch'), default=0))}/{run.config.get('num_epochs', '?')}"
            progress = count(len(run.table), "run") if run.table else progress
    except (JobError, ValueError) as error:
        return {**described, "about": str(error), "resume_with": ""}
    about = ", ".join(f"{name} {formatted(value, forms.get(name, 'number'))}" for name, value in metrics.items())
    state = "finished" if run.result else f"running on {owner}" if owner else "unfinished"
    output = OutputConfig(run_name=folder.name, storage_path=folder.storage_path)
    resume_with = resume_command(kind, output) if state == "unfinished" else ""
    found = {"kind": kind, "state": state, "progress": progress, "metrics": metrics, "forms": forms}
    return {**described, **found, "about": about, "resume_with": resume_with}


def _metrics(run: Run) -> dict[str, float]:
    """Return the metrics of the result or, without one, of the last validation."""
    values, prefix = run.result, f"{run.evaluated}_"
    if not values and (rows := [row for row in run.history if not math.isnan(row.get("val_loss", math.nan))]):
        values, prefix = rows[-1], "val_"
    numbers = {name: number_of(value) for name, value in values.items() if name.startswith(prefix) and name != "val_s"}
    return {name: number for name, number in numbers.items() if not math.isnan(number)}
