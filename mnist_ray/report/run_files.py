"""Reads and writes a run's CSV files, and reads everything that a report is made of."""

from __future__ import annotations

import csv
import io
import math
import posixpath
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mnist_ray import settings
from mnist_ray.errors import UsageError
from mnist_ray.runs import untrusted_folders
from mnist_ray.storage import (
    CONFIG_FILE,
    MEMBERS_FILE,
    MEMBERS_FOLDER,
    ORIGIN_FILE,
    RESULT_FILE,
    RunFolder,
)
from mnist_ray.training.events import TIMES
from mnist_ray.workload import loading
from mnist_ray.workload.base import Workload
from mnist_ray.workload.figures import Figure, logged_figures

METRICS_FILE, STEPS_FILE = "metrics.csv", "steps.csv"
FORMAT_VERSION = 2  # of the files
DONE, STOPPED, FAILED, LOST, RUNNING, WAITING = "done", "stopped early", "failed", "lost", "running", "waiting"
ENDED = (DONE, STOPPED, FAILED)  # a resumed job does not repeat these members; it resumes others from checkpoints


def read_csv(run: RunFolder, file_name: str, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """Return the rows of a file; none if there is no file. Raises JobError, e.g. for a missing column."""
    text = run.read_text(file_name)
    if text is None:
        return []
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        names = [*(reader.fieldnames or ())]
        rows = [*reader]
    except csv.Error as error:
        raise run.damaged(file_name, error) from error
    for column in columns:
        if column not in names:
            raise run.damaged(file_name, f"it has no column {column}")
    if any(None in row or None in row.values() for row in rows):  # how DictReader marks rows too long or too short
        raise run.damaged(file_name, f"a row does not have {len(names)} values")
    return rows


def read_numbers(run: RunFolder, file_name: str, *columns: str) -> list[dict[str, float]]:
    """Return the rows of a file of numbers; NaN for a missing value, except in ``columns``. Raises JobError."""
    rows = read_csv(run, file_name, columns)
    try:
        numbers = [{name: float(value) if value else math.nan for name, value in row.items()} for row in rows]
    except ValueError as error:
        raise run.damaged(file_name, error) from error
    if not all(math.isfinite(row[column]) for row in numbers for column in columns):
        raise run.damaged(file_name, f"a row has no {' or no '.join(columns)}")
    return numbers


def number_of(value: object) -> float:
    """Return a value of a JSON file as a number; NaN if it is null, missing, too large or not a number."""
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.nan


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], *, has_header: bool = False) -> str:
    """Return the lines of a CSV file; values that belong to no column are left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    if has_header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_members(run: RunFolder) -> list[dict[str, str]]:
    """Return the rows of members.csv; none if the run is not one of many. Raises JobError."""
    rows = read_csv(run, MEMBERS_FILE, ("member", "run", "seed", "fold", "state"))
    for row in rows:
        if row["run"] in ("", ".", "..") or "/" in row["run"]:
            raise run.damaged(MEMBERS_FILE, f"{row['run']} is no name of a folder")
    return rows


def folder_of_result(run: RunFolder) -> RunFolder:
    """Return the run that has made the tested checkpoint: of many runs, one of the members. Raises JobError."""
    checkpoint = posixpath.dirname((run.read_json(RESULT_FILE) or {}).get("checkpoint", ""))
    return run.inside(checkpoint) if checkpoint else run


@dataclass(frozen=True)
class MemberRecord:
    """What a report shows of one of many runs."""

    row: dict[str, str]  # of members.csv
    epochs: list[dict[str, float]]  # rows of metrics.csv; NaN for missing values
    result: dict[str, Any]  # empty until the run is tested

    @classmethod
    def read_all(cls, run: RunFolder) -> list[MemberRecord]:
        """Read the members of a job of many runs, in its order; none for a single run. Raises JobError."""
        found = []
        for row in read_members(run):
            member = run.inside(MEMBERS_FOLDER).inside(row["run"])
            epochs = read_numbers(member, METRICS_FILE, "epoch")
            found.append(cls(row, epochs, member.read_json(RESULT_FILE) or {}))
        return found


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The content of a run's files."""

    run: RunFolder
    workload: Workload
    config: dict[str, Any]
    origin: dict[str, Any]  # versions, command line, commit
    epochs: list[dict[str, float]]  # rows of metrics.csv; NaN for missing values
    steps: list[dict[str, float]]  # rows of steps.csv
    result: dict[str, Any] | None  # None until the run is tested
    members: list[MemberRecord]  # of a job of many runs

    @property
    def tested(self) -> list[MemberRecord]:
        """The members of the result; all members if there is none yet."""
        names = [posixpath.basename(path) for path in (self.result or {}).get("members", ())]
        return [member for member in self.members if not names or member.row["run"] in names]

    @property
    def logged(self) -> list[Figure]:
        """What the steps have logged."""
        known = (*self.workload.all_figures, *TIMES)
        return logged_figures((name for row in self.steps[-1:] for name in row), known)

    @classmethod
    def read(cls, run: RunFolder, workload: Workload) -> RunRecord:
        """Read a run's files. Raises UsageError if there are no settings, and JobError if a file is damaged."""
        return cls(
            run=run,
            workload=workload,
            config=settings_of(run),
            origin=run.read_json(ORIGIN_FILE) or {},
            epochs=read_numbers(run, METRICS_FILE, "epoch"),
            steps=read_numbers(run, STEPS_FILE, "step", "epoch"),
            result=run.read_json(RESULT_FILE),
            members=MemberRecord.read_all(run),
        )

    def column(self, name: str) -> list[float]:
        """Return a column of metrics.csv; all NaN if there is no such column."""
        return [row.get(name, math.nan) for row in self.epochs]

    @property
    def steps_per_epoch(self) -> float:
        """Training steps per epoch (the last epoch may have fewer); 1 if there was no step."""
        *_, last = self.steps or [{"step": 1.0, "epoch": 1.0}]
        whole = [row for row in self.steps if row["epoch"] <= math.ceil(last["epoch"]) - 1]
        end = [last, *whole][-1]
        return end["step"] / end["epoch"]

    @property
    def best_validation(self) -> float:
        """The best validation of the monitored metric; NaN if nothing was validated."""
        monitor = self.workload.monitor
        known = [value for value in self.column(f"val_{monitor.name}") if not math.isnan(value)]
        return (max if monitor.mode == "max" else min)(known, default=math.nan)


def settings_of(run: RunFolder) -> dict[str, Any]:
    """Return the settings of a run. Raises UsageError if it has none, JobError if they are damaged."""
    if not run.exists(CONFIG_FILE):
        raise UsageError(f"{run.uri} is not a run: it has no {CONFIG_FILE}")
    return run.require_json(CONFIG_FILE)


def workload_of(
    run: RunFolder, reference: loading.Reference | None, storage_path: str, outer: RunFolder | None = None
) -> Workload:
    """Return a run's workload, by default with the code that the run used. Raises UsageError and JobError.

    ``outer``: the run that this one is a member of.
    """
    values, file = settings_of(run), run.inside(CONFIG_FILE).uri
    held, untrusted = values.get("workload", loading.DEFAULT), untrusted_folders(outer or run, storage_path)
    workload_class = loading.load_again(held, reference, file, untrusted)
    try:
        own: Any = settings.build(workload_class.Settings, values)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    origin = run.read_json(ORIGIN_FILE) or {}
    return workload_class(own, origin.get("metadata"))
