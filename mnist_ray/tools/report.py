"""Making a run's report again, and comparing several runs: ``jobs/report.py`` once its flags are read."""

from __future__ import annotations

import json

from mnist_ray import settings
from mnist_ray.display import report
from mnist_ray.display.report import RunRecord
from mnist_ray.errors import JobError, UsageError
from mnist_ray.screen import say
from mnist_ray.storage import ORIGIN_FILE, REPORT_FILE, TRIALS_FILE, RunFolder, write_file
from mnist_ray.sweeps.report import sections
from mnist_ray.training.checkpoint import FACTS_BEFORE_WORKLOADS
from mnist_ray.workload import source
from mnist_ray.workload.data import Part
from mnist_ray.workload.interface import Workload
from mnist_ray.workload.loading import load_data


def workload_of(run: RunFolder, reference: str | None) -> Workload:
    """Return the workload of a run, of which the code comes from ``reference``, else from where it was."""
    values = report.read_config(run)
    workload_class = source.load_again(values.get("workload", source.DEFAULT), reference)
    origin = json.loads(run.read_text(ORIGIN_FILE) or "{}")
    return workload_class(settings.build(workload_class.Settings, values), origin.get("facts", FACTS_BEFORE_WORKLOADS))


def write_again(run: RunFolder, reference: str | None) -> None:
    """Make the report of one run again. Raises UsageError and JobError."""
    workload, test = workload_of(run, reference), None
    try:
        test = Part(load_data(workload).test, origin="test")
    except (UsageError, JobError) as error:
        say(f"no pictures of predictions: {error}")
    job = "train" if run.read_text(TRIALS_FILE) is None else "tune"
    resume_with = run.resume_command(f"python jobs/{job}.py")
    report.write(run, workload, resume_with, test, sections(run, type(workload)))
    say(f"report {run.inside(REPORT_FILE).uri}")


def compare(runs: list[RunFolder], reference: str | None, output: str) -> None:
    """Write a page of several runs side by side. Raises UsageError and JobError."""
    records = [RunRecord.read(run, workload_of(run, reference)) for run in runs]
    write_file(settings.path_of(output, "--output"), report.compare(records).encode("utf-8"))
    say(f"report {output}")
