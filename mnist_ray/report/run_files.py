"""Reads and writes a run's CSV files, and reads everything that a report is made of."""

from __future__ import annotations

import csv
import html
import io
import math
import posixpath
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_ray import process, settings
from mnist_ray.config import ExportConfig
from mnist_ray.errors import UsageError
from mnist_ray.runs import untrusted_folders
from mnist_ray.schema import (
    BEST_FILE,
    CONFIG_FILE,
    MEMBERS_FILE,
    MEMBERS_FOLDER,
    METRICS_FILE,
    ORIGIN_FILE,
    REPORT_FILE,
    RESULT_FILE,
    STEPS_FILE,
)
from mnist_ray.storage import RunFolder
from mnist_ray.training.events import TIMES
from mnist_ray.workload import loading
from mnist_ray.workload.base import Workload
from mnist_ray.workload.figures import IN_WORDS, Figure, logged_figures

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from mnist_ray.checkpoints.find import Found

FORMAT_VERSION = 2  # of the files
DONE, STOPPED, FAILED, LOST, RUNNING, WAITING = "done", "stopped early", "failed", "lost", "running", "waiting"
Row = Mapping[str, float]  # of steps.csv
_REPORT_HEIGHT = 600  # pixels, in a notebook
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


def merged(rows: Sequence[Row], number: int, figures: Sequence[Figure]) -> list[Row]:
    """Join each ``number`` neighbouring rows of steps.csv; means weigh a row by its steps, and skip NaN."""
    means = [figure.name for figure in figures if figure.over == "mean" and "step" in figure.at]
    sizes = [row["step"] - before for before, row in zip([0.0, *(row["step"] for row in rows)], rows, strict=False)]
    found = list[Row]()
    for start in range(0, len(rows), number):
        joint = rows[start : start + number]
        values = {**joint[-1], **joined(joint, figures)}
        for name in means:
            parts = [(row.get(name, math.nan), size) for row, size in zip(joint, sizes[start:], strict=False)]
            known = [(mean, size) for mean, size in parts if not math.isnan(mean)]
            total = math.fsum(size for _, size in known)
            values[name] = math.fsum(mean * size for mean, size in known) / total if known else math.nan
        found.append(values)
    return found


def joined(rows: Sequence[Row], figures: Sequence[Figure]) -> dict[str, float]:
    """Return one value for these rows of steps.csv, for each figure that is not a mean."""
    others = [figure for figure in figures if "step" in figure.at and figure.over != "mean"]
    return {figure.name: figure.join(row.get(figure.name, math.nan) for row in rows) for figure in others}


def number_of(value: object) -> float:
    """Return a value of a JSON file as a number; NaN if it is null, missing or not a number."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a CSV file; values that belong to no column are left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
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


class Run:
    """A run, as its files describe it. Each is read when it is first asked for. In a notebook, it shows its report.

    What is read raises JobError if a file is damaged.
    """

    folder: RunFolder  # reads and writes the files of the run
    row: Mapping[str, str] = {}  # of members.csv, if the run is one of many

    def __init__(self, folder: RunFolder, workload: Workload | None = None) -> None:
        self.folder, self._workload = folder, workload

    @property
    def name(self) -> str:
        """The run's name, by which other commands find the run."""
        return self.folder.name

    @property
    def workload(self) -> Workload:
        """The workload, with the settings and the metadata of the run."""
        if self._workload is None:
            tested = folder_of_result(self.folder)  # of a sweep, its best configuration's run
            self._workload = workload_of(tested, None, self.folder.storage_path, self.folder)
        return self._workload

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json: all settings."""
        return settings_of(self.folder)

    @cached_property
    def origin(self) -> dict[str, Any]:
        """The content of origin.json: versions, command line, commit."""
        return self.folder.read_json(ORIGIN_FILE) or {}

    @cached_property
    def result(self) -> dict[str, Any]:
        """The content of result.json; empty until the run is tested."""
        return self.folder.read_json(RESULT_FILE) or {}

    def check_tested(self) -> None:
        """Raise UsageError unless the run is trained and tested."""
        if not self.config or not self.result:
            raise UsageError(f"run {self.folder.uri} is not finished: it has no {RESULT_FILE} yet")

    @cached_property
    def history(self) -> list[dict[str, float]]:
        """The rows of metrics.csv, one per epoch or validation; NaN for missing values."""
        return read_numbers(self.folder, METRICS_FILE, "epoch")

    @cached_property
    def steps(self) -> list[dict[str, float]]:
        """The rows of steps.csv: about one per half second of training, at most 10,000."""
        return read_numbers(self.folder, STEPS_FILE, "step", "epoch")

    @cached_property
    def predictions(self) -> dict[str, np.ndarray]:
        """The columns of predictions.parquet, (N, ...) each; none if the workload has none."""
        from mnist_ray.report.columns import read_columns  # imports pyarrow's Parquet, for 0.1 s

        return read_columns(self.folder)

    @cached_property
    def table(self) -> list[dict[str, str]]:
        """The rows of members.csv: all runs of a job of many; none of a single run."""
        return read_members(self.folder)

    @cached_property
    def best(self) -> dict[str, Any]:
        """Of a sweep, the searched settings in its best configuration. Raises JobError until there is one."""
        values = self.folder.require_json(BEST_FILE)
        searched = [space.partition("=")[0] for space in self.config.get("sweep", ())]
        return {name: values[name] for name in searched}

    @cached_property
    def all_members(self) -> list[Run]:
        """The runs of the table, in its order."""
        found = []
        for row in self.table:
            member = Run(self.folder.inside(MEMBERS_FOLDER).inside(row["run"]), self._workload)
            member.row = row
            found.append(member)
        return found

    @property
    def members(self) -> list[Run]:
        """The runs of the result, of a job of several seeds or folds or a sweep; all of them until there is one."""
        by_name = {member.name: member for member in self.all_members}
        names = [posixpath.basename(path) for path in self.result.get("members", ())]
        return [by_name[name] for name in names or by_name if name in by_name]

    @property
    def evaluated(self) -> str:
        """The set that the result is about: ``test``, or ``val`` without a test set."""
        return "val" if self.result.get("evaluated") == "val" else "test"

    @property
    def metrics(self) -> dict[str, float]:
        """Loss and metrics on the evaluated set; NaN for a metric added to the workload since."""
        names = [metric.name for metric in self.workload.all_metrics]
        return {name: number_of(self.result.get(f"{self.evaluated}_{name}")) for name in names}

    @property
    def checkpoint(self) -> str:
        """Path or URI of the tested checkpoint; until there is one, of the best by validation."""
        from mnist_ray.checkpoints.find import checkpoint_of

        return checkpoint_of(self.folder).uri

    @property
    def report(self) -> str:
        """Path or URI of the report."""
        return self.folder.inside(REPORT_FILE).uri

    def load_model(self) -> nn.Module:
        """Return the trained model on the CPU, in evaluation mode. Raises JobError if the checkpoint is damaged."""
        model: nn.Module = self.found().load_model()
        return model

    @process.left_as_found()
    def export(self, output: str | Path = "model.pt2") -> Path:
        """Write the model like ``mnist-ray export``, by the ending: ``.pt2``, ``.onnx`` or ``.safetensors``.

        Returns the path. Raises UsageError, also if PyTorch cannot export the model, and JobError.
        """
        from mnist_ray.report.export import export

        return export(self.found(), settings.build(ExportConfig, {"output": output}))

    def found(self, changes: Mapping[str, Any] | None = None) -> Found:
        """Return the checkpoint with its workload; ``changes`` are of its settings."""
        from mnist_ray.checkpoints.find import find

        reference = loading.reference_of(type(self.workload))
        return find(self.checkpoint, self.folder.storage_path, reference, changes)

    @property
    def logged(self) -> list[Figure]:
        """What the steps have logged, and the metrics on further validation sets."""
        known = (*self.workload.all_figures, *TIMES)
        return logged_figures((name for row in (*self.steps[-1:], *self.history[-1:]) for name in row), known)

    def column(self, name: str) -> list[float]:
        """Return a column of metrics.csv; all NaN if there is no such column."""
        return [row.get(name, math.nan) for row in self.history]

    @property
    def best_validation(self) -> float:
        """The best validation of the monitored metric; NaN if nothing was validated."""
        monitor = self.workload.monitor
        known = [value for value in self.column(f"val_{monitor.name}") if not math.isnan(value)]
        return (max if monitor.mode == "max" else min)(known, default=math.nan)

    def __str__(self) -> str:
        return f"{self.name}: {self.workload.format(self.metrics)} on the {IN_WORDS[self.evaluated]} set"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"

    def _repr_html_(self) -> str:
        page = html.escape(self.folder.read_text(REPORT_FILE) or str(self))
        return f'<iframe sandbox srcdoc="{page}" width="100%" height="{_REPORT_HEIGHT}" frameborder="0"></iframe>'


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
