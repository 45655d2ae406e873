"""What a run has left: its CSV files, which are written here, too, and all files that a report is made of."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mnist_ray import settings
from mnist_ray.config import LookupConfig
from mnist_ray.errors import UsageError
from mnist_ray.storage import (
    CONFIG_FILE,
    ORIGIN_FILE,
    RESULT_FILE,
    RunFolder,
    Warn,
    unless_damaged,
    untrusted_folders,
)
from mnist_ray.workload import loading
from mnist_ray.workload.base import Workload

METRICS_FILE, STEPS_FILE, PREDICTIONS_FILE = "metrics.csv", "steps.csv", "predictions.csv"


def read_csv(
    run: RunFolder, file_name: str, columns: Iterable[str] = (), *, is_appended: bool = False
) -> list[dict[str, str]]:
    """Return the rows of a file in a run's folder; none if there is no such file.

    ``is_appended``: its last line may be incomplete, since it is being written or a kill came; it is left out then.
    Raises DamagedFileError if the file is no CSV, or lacks one of ``columns``.
    """
    text = run.read_text(file_name)
    if text is None:
        return []
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1] if is_appended else text), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise run.damaged(file_name, error) from error
    names = reader.fieldnames or ()
    for column in columns:
        if column not in names:
            raise run.damaged(file_name, f"it has no column {column}")
    if any(None in row or None in row.values() for row in rows):  # of a row with more values than columns, or fewer
        raise run.damaged(file_name, f"a row has not {len(names)} values")
    return rows


def read_steps(run: RunFolder) -> list[dict[str, str]]:
    """Return the rows of steps.csv. Raises DamagedFileError."""
    return read_figures(run, STEPS_FILE, "step", "epoch", is_appended=True)


def read_figures(run: RunFolder, file_name: str, *places: str, is_appended: bool = False) -> list[dict[str, str]]:
    """Return the rows of a file of numbers, some of which may be missing.

    ``places`` are columns that say where in the training a row belongs; the first counts. Raises DamagedFileError.
    """
    rows = read_csv(run, file_name, places, is_appended=is_appended)
    try:
        for row in numbers_of(rows):
            if not (row[places[0]].is_integer() and all(0 < row[place] < math.inf for place in places)):
                raise ValueError(f"there is no {places[0]} {row[places[0]]:g}")
    except ValueError as error:
        raise run.damaged(file_name, error) from error
    return rows


def numbers_of(rows: Iterable[Mapping[str, str]]) -> list[dict[str, float]]:
    """Return rows of texts as numbers, NaN for an empty text. Raises ValueError."""
    return [{name: float(value) if value else math.nan for name, value in row.items()} for row in rows]


def write_csv(run: RunFolder, file_name: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows into a file of a run's folder, as a whole. Raises JobError."""
    run.write_text(file_name, csv_text(columns, rows, has_header=True))


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], *, has_header: bool = False) -> str:
    """Return rows as lines of a CSV file, without values that are in no column."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    if has_header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run's folder tells of it."""

    run: RunFolder
    workload: Workload
    config: dict[str, Any]
    origin: dict[str, Any]  # versions, command line, commit
    epochs: list[dict[str, float]]  # rows of metrics.csv; NaN if a value is not there (yet)
    steps: list[dict[str, float]]  # rows of steps.csv
    result: dict[str, Any] | None  # None if the run has not finished, as the next
    predictions: list[dict[str, str]]  # rows of predictions.csv
    notes: Sequence[str] = ()  # which of the files are damaged, and so left out

    @classmethod
    def read(cls, run: RunFolder, workload: Workload) -> RunRecord:
        """Read a run's files. Raises UsageError if it has no settings, JobError if these are damaged."""
        notes: list[str] = []
        result = unless_damaged(lambda: _checked_result(run, workload, notes.append), notes.append)
        number = result.get(f"num_test_{workload.nouns}") if result else None
        return cls(
            run=run,
            workload=workload,
            config=settings_of(run),
            origin=run.read_json(ORIGIN_FILE, notes.append) or {},
            epochs=numbers_of(unless_damaged(lambda: read_figures(run, METRICS_FILE, "epoch"), notes.append) or []),
            steps=numbers_of(unless_damaged(lambda: read_steps(run), notes.append) or []),
            result=result,
            predictions=unless_damaged(lambda: _checked_predictions(run, number), notes.append) or [],
            notes=notes,
        )

    def column(self, name: str) -> list[float]:
        """Return a column of metrics.csv; NaN if it has none of that name."""
        return [row.get(name, math.nan) for row in self.epochs]

    @property
    def steps_per_epoch(self) -> float:
        """Steps of an epoch; 1 if none was trained."""
        return self.steps[-1]["step"] / self.steps[-1]["epoch"] if self.steps else 1.0

    @property
    def best_validation(self) -> float:
        """Of the workload's monitor; NaN if nothing was validated."""
        monitor = self.workload.monitor
        known = [value for value in self.column(f"val_{monitor.name}") if not math.isnan(value)]
        return (max if monitor.mode == "max" else min)(known, default=math.nan)


def settings_of(run: RunFolder) -> dict[str, Any]:
    """Return the settings of a run. Raises UsageError if it has none, JobError if they are damaged."""
    if not run.exists(CONFIG_FILE):
        raise UsageError(f"{run.uri} is no run: it has no {CONFIG_FILE}")
    return run.require_json(CONFIG_FILE)


def _checked_result(run: RunFolder, workload: Workload, warn: Warn) -> dict[str, Any] | None:
    """Return a run's result, of which the values that the page shows are numbers."""
    result = run.read_json(RESULT_FILE, warn)
    if result is None:
        return None
    names = [f"test_{metric.name}" for metric in workload.all_metrics] + [f"num_test_{workload.nouns}", workload.rate]
    for value in (result[name] for name in names if result.get(name) is not None):
        if not isinstance(value, (int, float)):
            raise run.damaged(RESULT_FILE, f"{value!r:.40} is no number")
    return result


def _checked_predictions(run: RunFolder, number: int | None) -> list[dict[str, str]]:
    """Return the predictions for all test examples that a run's result is about."""
    if number is None or not run.exists(PREDICTIONS_FILE):
        return []
    rows = read_csv(run, PREDICTIONS_FILE)
    if len(rows) != number:
        raise run.damaged(PREDICTIONS_FILE, f"it has {len(rows):,} rows, not one for each of {number:,} test examples")
    return rows


def workload_of(run: RunFolder, reference: str | None, storage_path: str = LookupConfig().storage_path) -> Workload:
    """Return the workload of a run; its code comes from ``reference``, else from where it was.

    Raises UsageError and JobError.
    """
    values, file = settings_of(run), run.inside(CONFIG_FILE).uri
    held, untrusted = values.get("workload", loading.DEFAULT), untrusted_folders(run, storage_path)
    workload_class = loading.load_again(held, reference, file, untrusted)
    try:
        own: Any = settings.build(workload_class.Settings, values)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    origin = run.read_json(ORIGIN_FILE) or {}
    return workload_class(own, origin.get("metadata"))
