"""The commands as functions, for scripts and notebooks: ``from mnist_ray import train, tune, evaluate, predict``.

Settings are keyword arguments, named and checked as the commands' flags are: ``train(num_workers=2, width=64)``.
What is wrong is raised as UsageError or JobError, whose text is the line that a command would print.
"""

from __future__ import annotations

import html
import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mnist_ray.cluster import environment
from mnist_ray.config import EvaluationConfig, ExportConfig, LookupConfig
from mnist_ray.errors import JobError, UsageError
from mnist_ray.report.run_files import METRICS_FILE, numbers_of, read_figures, read_steps
from mnist_ray.run.job import Job, read_job
from mnist_ray.run.lookup import IsWanted
from mnist_ray.run.train import train as train_job
from mnist_ray.settings import build, check_known, names_of
from mnist_ray.storage import REPORT_FILE, RESULT_FILE, RunFolder
from mnist_ray.sweep.options import BEST_FILE, DEFAULT_FOLDER, read_sweep
from mnist_ray.sweep.trials import TrialTable
from mnist_ray.sweep.tune import tune as tune_sweep
from mnist_ray.workload.base import Workload
from mnist_ray.workload.loading import Reference
from ray_fork.starting import prepared_forking

if TYPE_CHECKING:
    from torch import nn

    from mnist_ray.run.find import Found
    from mnist_ray.tools.predict import Prediction

AnyWorkload = type[Workload] | str | Path | None  # a class, or what ``--workload`` takes; None: MNIST, or a run's own
_REPORT_HEIGHT = 600  # pixels, in a notebook


@dataclass(frozen=True, repr=False)
class Run:
    """A run that was trained and tested. In a notebook it shows its report."""

    folder: RunFolder
    workload: Workload
    result: dict[str, Any]  # what its result.json holds

    @property
    def name(self) -> str:
        """What other commands know it by."""
        return self.folder.name

    @property
    def metrics(self) -> dict[str, float]:
        """Loss and metrics on the test set."""
        return {metric.name: self.result[f"test_{metric.name}"] for metric in self.workload.all_metrics}

    @property
    def history(self) -> list[dict[str, float]]:
        """A row for each epoch, as metrics.csv has them; NaN if a value is not there."""
        return numbers_of(read_figures(self.folder, METRICS_FILE, "epoch"))

    @property
    def steps(self) -> list[dict[str, float]]:
        """A row for about each half second of training, as steps.csv has them."""
        return numbers_of(read_steps(self.folder))

    @property
    def checkpoint(self) -> str:
        """Path or URI of the checkpoint that was tested."""
        return self.folder.inside(self.result["checkpoint"]).uri

    @property
    def report(self) -> str:
        """Path or URI of the report."""
        return self.folder.inside(REPORT_FILE).uri

    def load_model(self) -> nn.Module:
        """Return the trained model, in evaluation mode, on the CPU. Raises JobError if it is damaged."""
        model: nn.Module = _found(self, None).load_model()
        return model

    def export(self, output: str | Path) -> None:
        """Write the model for other programs, as ``jobs/export.py`` does: ``.pt2`` for torch, ``.onnx`` for ONNX.

        Raises UsageError and JobError.
        """
        from mnist_ray.tools.export import export

        kind: Literal["torch", "onnx"] = "onnx" if Path(output).suffix == ".onnx" else "torch"
        export(_found(self, None), ExportConfig(format=kind, output=os.fspath(output)))

    def __str__(self) -> str:
        return f"{self.name}: {self.workload.format(self.metrics)} on the test set"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"

    def _repr_html_(self) -> str:
        page = self.folder.read_text(REPORT_FILE)
        if page is None:
            return html.escape(str(self))
        frame = f'width="100%" height="{_REPORT_HEIGHT}" frameborder="0"'
        return f'<iframe srcdoc="{html.escape(page)}" {frame}></iframe>'


@dataclass(frozen=True, repr=False)
class SweptRun(Run):
    """The training of a sweep's best configuration."""

    best: dict[str, Any]  # the settings that were searched, as the best configuration has them
    trials: list[dict[str, Any]]  # a row for each trial, with the columns of sweep.csv
    default: Run | None  # the training of the default configuration; None if the best is the default


def train(workload: AnyWorkload = None, **settings: Any) -> Run:
    """Train, evaluate and report as ``jobs/train.py`` does; return the run.

    ``workload`` is a class, or what ``--workload`` takes; without it, MNIST. Raises UsageError, JobError, and
    KeyboardInterrupt if it was interrupted.
    """
    job = read_job(_given(workload, settings))
    train_job(job)
    return _run(job)


def tune(workload: AnyWorkload = None, **settings: Any) -> SweptRun:
    """Search, then train and evaluate the best, as ``jobs/tune.py`` does; return that run. Raises as ``train``.

    ``sweep`` may also be a dict: ``{"width": [8, 32], "learning_rate": "log:1e-3:1e-1"}``.
    """
    if isinstance(searched := settings.get("sweep"), Mapping):
        settings["sweep"] = [f"{name}={_space_text(space)}" for name, space in searched.items()]
    sweep = read_sweep(_given(workload, settings))
    tune_sweep(sweep)
    job, best = sweep.job, sweep.job.run.require_json(BEST_FILE)
    default = job.run.inside(DEFAULT_FOLDER)
    default_result = default.read_json(RESULT_FILE)
    return SweptRun(
        **vars(_run(job)),
        best={name: best[name] for name in sweep.space.spaces},
        trials=TrialTable(type(job.workload), sweep.space).read(job.run).rows,
        default=None if default_result is None else Run(default, job.workload, default_result),
    )


def _space_text(space: Any) -> str:
    return space if isinstance(space, str) else ",".join("none" if value is None else str(value) for value in space)


def evaluate(run: Run | str | None = None, *, workload: AnyWorkload = None, **settings: Any) -> dict[str, float]:
    """Evaluate a run's checkpoint on the test set, as ``jobs/evaluate.py`` does; return loss and metrics.

    ``run`` is a run, its name, or a checkpoint's path; without it, the newest run's. ``settings`` are ``num_tasks``,
    ``storage_path`` and those of the workload, as for other data. Raises UsageError and JobError.
    """
    environment.prepare(verbose=False)
    with prepared_forking("mnist_ray.run.evaluate") as forking:
        found = _found(run, workload, settings)
        classes = [EvaluationConfig, LookupConfig, type(found.workload).Settings]
        check_known(settings, names_of(classes), "evaluate()")

        from mnist_ray.tools.evaluation import evaluate_found

        return evaluate_found(found, build(EvaluationConfig, settings), forking).values(found.workload)


def predict(
    pictures: Any,
    run: Run | str | None = None,
    *,
    workload: AnyWorkload = None,
    storage_path: str = LookupConfig().storage_path,
    as_is: bool = False,
) -> list[Prediction]:
    """Return a trained model's predictions, as ``jobs/predict.py`` prints them.

    ``pictures`` are paths of pictures or of folders, Pillow images, or an array of inputs as the data have them,
    (N, ...); or one of the first two. ``as_is``: scale pictures and no more. Raises UsageError and JobError.
    """
    found = _found(run, workload, {"storage_path": storage_path})
    from mnist_ray.tools import predict as tool

    model = found.load_model()
    if isinstance(pictures, np.ndarray):
        return tool.predict_inputs(found.workload, model, pictures)
    some = pictures if isinstance(pictures, (list, tuple)) else [pictures]
    if all(isinstance(picture, (str, os.PathLike)) for picture in some):
        return list(tool.predict_files(found.workload, model, list(tool.find_files(map(str, some))), as_is=as_is))
    inputs = [found.workload.read_picture(picture, as_is=as_is) for picture in some]
    return tool.predict_inputs(found.workload, model, np.stack(inputs))


def _run(job: Job) -> Run:
    if job.output.check:
        raise JobError(f"run {job.run.name} has no result: with check=True, nothing is trained")
    workload = job.workload
    return Run(job.run, type(workload)(workload.settings, workload.metadata), job.run.require_json(RESULT_FILE))


def _given(workload: AnyWorkload, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a command line would say."""
    if "storage_path" in settings:
        settings = settings | {"storage_path": os.fspath(settings["storage_path"])}
    if workload is None:
        return settings
    return settings | {"workload": reference_of(workload, is_here=settings.get("num_workers") == 0)}


def _found(run: Run | str | None, workload: AnyWorkload, settings: Mapping[str, Any] | None = None) -> Found:
    """Return a checkpoint with its workload, of which some of ``settings`` are to override its own."""
    environment.prepare(verbose=False)
    changes = {"storage_path": LookupConfig().storage_path, **(settings or {})}
    storage_path, _ = os.fspath(changes.pop("storage_path")), changes.pop("num_tasks", None)
    if isinstance(run, Run):
        workload, run = workload or type(run.workload), run.checkpoint
    return find_checkpoint(run, storage_path, None if workload is None else reference_of(workload), changes)


def find_checkpoint(
    given: str | None,
    storage_path: str,
    reference: Reference | None = None,
    changes: Mapping[str, Any] | None = None,
    is_wanted: IsWanted = lambda run: True,
) -> Found:
    """Do what ``find`` does; it imports torch and Ray."""
    from mnist_ray.run.find import find

    return find(given, storage_path, reference, changes, is_wanted)


def reference_of(workload: type[Workload] | str | Path, *, is_here: bool = False) -> Reference:
    """Return what names a workload: for a class, where its code is. Raises UsageError.

    ``is_here``: a class that other processes cannot find, in a notebook's cell, will do.
    """
    if not isinstance(workload, type):
        return os.fspath(workload)
    if "source" in vars(workload):
        return workload.source.reference if workload.source.path else workload
    file = getattr(sys.modules[workload.__module__], "__file__", None)
    is_in_file = file is not None and Path(file).is_file()  # else in a notebook's cell, or piped into Python
    if not is_in_file and is_here:
        return workload
    if not is_in_file:
        raise UsageError(
            f"{workload.__name__} is in a notebook's cell, where other processes cannot find it: write the cell into a "
            f"file, with %%writefile {workload.__name__.lower()}.py as its first line, and give the file's name; or "
            "train it in this process, with num_workers=0"
        )
    if "." in workload.__module__:
        return f"{workload.__module__}:{workload.__qualname__}"
    return f"{Path(inspect.getfile(workload)).resolve()}:{workload.__qualname__}"
