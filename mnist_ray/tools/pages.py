"""Making a run's report again, and comparing several runs: ``jobs/report.py`` once its flags are read."""

from __future__ import annotations

from typing import Any

from mnist_ray import settings
from mnist_ray.config import LookupConfig
from mnist_ray.errors import JobError, UsageError, say
from mnist_ray.report import page
from mnist_ray.report.compare import compare as compare_runs
from mnist_ray.report.page import RunRecord
from mnist_ray.run.job import way_on
from mnist_ray.storage import (
    CONFIG_FILE,
    ORIGIN_FILE,
    REPORT_FILE,
    TRIALS_FILE,
    RunFolder,
    untrusted_folders,
    write_file,
)
from mnist_ray.sweep.picture import sections
from mnist_ray.training.checkpoint import read_state
from mnist_ray.workload import source
from mnist_ray.workload.base import Workload
from mnist_ray.workload.data import Split
from mnist_ray.workload.source import load_data


def workload_of(run: RunFolder, reference: str | None, storage_path: str = LookupConfig().storage_path) -> Workload:
    """Return the workload of a run, of which the code comes from ``reference``, else from where it was.

    Raises UsageError and JobError.
    """
    values = page.settings_of(run)
    held, untrusted = values.get("workload", source.DEFAULT), untrusted_folders(run, storage_path)
    workload_class = source.load_again(held, reference, run.inside(CONFIG_FILE).uri, untrusted)
    try:
        own: Any = settings.build(workload_class.Settings, values)
    except UsageError as error:
        raise UsageError(f"{run.inside(CONFIG_FILE).uri}: {error}") from error
    return workload_class(own, _facts_of(run))


def _facts_of(run: RunFolder) -> dict[str, Any]:
    """Return what a run's model knows of its data; where the file that says so is damaged, from a checkpoint."""
    origin, names = run.read_json(ORIGIN_FILE), run.checkpoint_names()
    if origin is None and names:
        metadata: dict[str, Any] = read_state(run.inside(names[-1]))["workload"]["metadata"]
        return metadata
    return run.require_json(ORIGIN_FILE)["metadata"] if run.exists(ORIGIN_FILE) else {}


def write_again(run: RunFolder, reference: str | None, storage_path: str) -> None:
    """Make the report of one run again. Raises UsageError and JobError."""
    workload, test = workload_of(run, reference, storage_path), None
    try:
        test = Split(load_data(workload).test, origin="test")
    except (UsageError, JobError) as error:
        say(f"no pictures of predictions: {error}")
    resume_with = way_on("tune" if run.exists(TRIALS_FILE) else "train", run)
    page.write(run, workload, resume_with, test, sections(run, type(workload)), warn=_warn)
    say(f"report {run.inside(REPORT_FILE).uri}")


def compare(runs: list[RunFolder], reference: str | None, storage_path: str, output: str) -> None:
    """Write a page of several runs side by side. Raises UsageError and JobError."""
    records = [RunRecord.read(run, workload_of(run, reference, storage_path)) for run in runs]
    for note in (note for record in records for note in record.notes):
        _warn(note)
    write_file(settings.path_of(output, "--output"), compare_runs(records).encode("utf-8"))
    say(f"report {output}")


def _warn(note: str) -> None:
    say(f"note {note}")
