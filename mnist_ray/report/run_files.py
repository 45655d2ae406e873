"""Reads and writes a run's CSV files, and reads everything that a report is made of."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mnist_ray import settings
from mnist_ray.errors import UsageError
from mnist_ray.storage import (
    CONFIG_FILE,
    ORIGIN_FILE,
    RESULT_FILE,
    TRIALS_FILE,
    RunFolder,
    Warn,
    unless_damaged,
    untrusted_folders,
)
from mnist_ray.workload import loading
from mnist_ray.workload.base import Workload

METRICS_FILE, STEPS_FILE, PREDICTIONS_FILE = "metrics.csv", "steps.csv", "predictions.csv"


def read_csv(run: RunFolder, file_name: str, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """Return the rows of a file; none if there is no file. Raises DamagedFileError, e.g. for a missing column."""
    text = run.read_text(file_name)
    if text is None:
        return []
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise run.damaged(file_name, error) from error
    names = reader.fieldnames or ()
    for column in columns:
        if column not in names:
            raise run.damaged(file_name, f"it has no column {column}")
    if any(None in row or None in row.values() for row in rows):  # how DictReader marks rows too long or too short
        raise run.damaged(file_name, f"a row does not have {len(names)} values")
    return rows


def read_values(run: RunFolder, file_name: str, *positions: str) -> list[dict[str, str]]:
    """Return the rows of a file of numbers, some of which may be missing. Raises DamagedFileError.

    ``positions`` are the columns for a row's position in the training; the first column has whole numbers.
    """
    rows = read_csv(run, file_name, positions)
    try:
        for row in numbers_of(rows):
            if not (row[positions[0]].is_integer() and all(0 < row[position] < math.inf for position in positions)):
                raise ValueError(f"there is no {positions[0]} {row[positions[0]]:g}")
    except ValueError as error:
        raise run.damaged(file_name, error) from error
    return rows


def numbers_of(rows: Iterable[Mapping[str, str]]) -> list[dict[str, float]]:
    """Turn the strings of rows into numbers, and an empty string into NaN. Raises ValueError."""
    return [{name: float(value) if value else math.nan for name, value in row.items()} for row in rows]


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], *, has_header: bool = False) -> str:
    """Return the lines of a CSV file; values that belong to no column are left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    if has_header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


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
    predictions: list[dict[str, str]]  # rows of predictions.csv; none until the run is tested
    trials: list[dict[str, str]]  # rows of sweep.csv; none if the run is no sweep
    notes: Sequence[str] = ()  # about damaged files, which are left out

    @classmethod
    def read(cls, run: RunFolder, workload: Workload) -> RunRecord:
        """Read a run's files. Raises UsageError if there are no settings, and JobError if they are damaged."""
        notes: list[str] = []
        warn = notes.append
        return cls(
            run=run,
            workload=workload,
            config=settings_of(run),
            origin=run.read_json(ORIGIN_FILE, warn) or {},
            epochs=numbers_of(unless_damaged(lambda: read_values(run, METRICS_FILE, "epoch"), warn) or []),
            steps=numbers_of(unless_damaged(lambda: read_values(run, STEPS_FILE, "step", "epoch"), warn) or []),
            result=unless_damaged(lambda: _checked_result(run, workload, warn), warn),
            predictions=unless_damaged(lambda: read_csv(run, PREDICTIONS_FILE), warn) or [],
            trials=unless_damaged(lambda: read_csv(run, TRIALS_FILE, [f"val_{workload.monitor.name}"]), warn) or [],
            notes=notes,
        )

    def column(self, name: str) -> list[float]:
        """Return a column of metrics.csv; only NaN if there is no column of this name."""
        return [row.get(name, math.nan) for row in self.epochs]

    @property
    def steps_per_epoch(self) -> float:
        """Training steps per epoch; 1 if there was no step."""
        return self.steps[-1]["step"] / self.steps[-1]["epoch"] if self.steps else 1.0

    @property
    def best_validation(self) -> float:
        """The best validation of the monitored metric; NaN if nothing was validated."""
        monitor = self.workload.monitor
        known = [value for value in self.column(f"val_{monitor.name}") if not math.isnan(value)]
        return (max if monitor.mode == "max" else min)(known, default=math.nan)


def settings_of(run: RunFolder) -> dict[str, Any]:
    """Return the settings of a run. Raises UsageError if it has none, JobError if they are damaged."""
    if not run.exists(CONFIG_FILE):
        raise UsageError(f"{run.uri} is no run, or a sweep that has not chosen yet: it has no {CONFIG_FILE}")
    return run.require_json(CONFIG_FILE)


def _checked_result(run: RunFolder, workload: Workload, warn: Warn) -> dict[str, Any] | None:
    """Return a run's result. Raises DamagedFileError if a value for the page is not a number."""
    result = run.read_json(RESULT_FILE, warn) or {}
    names = [f"test_{metric.name}" for metric in workload.all_metrics] + [f"num_test_{workload.nouns}", workload.rate]
    seconds = {"total": "missing", **result["seconds"]} if result else {}
    for value in [*map(result.get, names), *seconds.values()]:
        if not isinstance(value, (int, float, type(None))):
            raise run.damaged(RESULT_FILE, f"{value!r:.40} is not a number")
    return result or None


def workload_of(run: RunFolder, reference: loading.Reference | None, storage_path: str) -> Workload:
    """Return a run's workload, by default with the code that the run used. Raises UsageError and JobError."""
    values, file = settings_of(run), run.inside(CONFIG_FILE).uri
    held, untrusted = values.get("workload", loading.DEFAULT), untrusted_folders(run, storage_path)
    workload_class = loading.load_again(held, reference, file, untrusted)
    try:
        own: Any = settings.build(workload_class.Settings, values)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    origin = run.read_json(ORIGIN_FILE) or {}
    return workload_class(own, origin.get("metadata"))
