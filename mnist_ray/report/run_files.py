"""Reading and writing the CSV files in a run's folder."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mnist_ray.storage import RunFolder

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
