"""The commands as functions, for scripts and notebooks: ``from mnist_ray import train, tune, evaluate, predict``.

Settings are keyword arguments, named and checked like the commands' flags: ``train(num_workers=2, width=64)``. Errors
are raised as UsageError or JobError, with the message that a command would print.
"""

from __future__ import annotations

import html
import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from mnist_ray import layers, process
from mnist_ray.cluster import environment
from mnist_ray.config import (
    EvaluationConfig,
    ExportConfig,
)
from mnist_ray.errors import JobError, UsageError
from mnist_ray.job.job import Job
from mnist_ray.many.jobs import read_sweep, read_train
from mnist_ray.many.jobs import run as run_job
from mnist_ray.many.points import options_text
from mnist_ray.report.run_files import (
    METRICS_FILE,
    STEPS_FILE,
    folder_of_result,
    number_of,
    read_numbers,
    settings_of,
    workload_of,
)
from mnist_ray.runs import find_run
from mnist_ray.settings import build, check_known, declared, values_of
from mnist_ray.storage import BEST_FILE, REPORT_FILE, RESULT_FILE, RunFolder
from mnist_ray.workload.base import Workload
from mnist_ray.workload.loading import Reference
from ray_fork.starting import prepared_forking

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from mnist_ray.checkpoints.find import Found
    from mnist_ray.keywords import TrainKeywords, TuneKeywords
    from mnist_ray.predictions.predictor import Prediction, Predictor
    from mnist_ray.tools.compare import Comparison

AnyWorkload = type[Workload] | str | Path | None  # a class, or a value of --workload; None: MNIST or the run's workload
_REPORT_HEIGHT = 600  # pixels, in a notebook


@dataclass(frozen=True, repr=False)
class Run:
    """A trained and tested run. In a notebook, it shows its report."""

    folder: RunFolder  # reads the files of the run
    workload: Workload  # with the settings and the metadata of the run
    result: dict[str, Any]  # the content of result.json

    @property
    def name(self) -> str:
        """The run's name, by which other commands find the run."""
        return self.folder.name

    @property
    def metrics(self) -> dict[str, float]:
        """Loss and metrics on the test set; NaN for a metric added to the workload since."""
        return {metric.name: number_of(self.result.get(f"test_{metric.name}")) for metric in self.workload.all_metrics}

    @property
    def history(self) -> list[dict[str, float]]:
        """The rows of metrics.csv, one per epoch; NaN for missing values."""
        return read_numbers(self.folder, METRICS_FILE, "epoch")

    @property
    def steps(self) -> list[dict[str, float]]:
        """The rows of steps.csv: about one per half second of training, at most 10,000."""
        return read_numbers(self.folder, STEPS_FILE, "step", "epoch")

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """The columns of predictions.parquet, (N, ...) each; none if the workload has none."""
        from mnist_ray.report.columns import read_columns  # imports pyarrow's Parquet, for 0.1 s

        return read_columns(self.folder)

    @property
    def members(self) -> list[Run]:
        """The runs of a job of several seeds or folds; none of a single run."""
        paths = [Path(path) for path in self.result.get("members", ())]
        folders = [self.folder.inside(str(path.parent)).inside(path.name) for path in paths]
        return [Run(folder, self.workload, folder.read_json(RESULT_FILE) or {}) for folder in folders]

    @property
    def checkpoint(self) -> str:
        """Path or URI of the tested checkpoint."""
        return self.folder.inside(self.result["checkpoint"]).uri

    @property
    def report(self) -> str:
        """Path or URI of the report."""
        return self.folder.inside(REPORT_FILE).uri

    def load_model(self) -> nn.Module:
        """Return the trained model on the CPU, in evaluation mode. Raises JobError if the checkpoint is damaged."""
        model: nn.Module = find(self).load_model()
        return model

    @process.left_as_found()
    def export(self, output: str | Path) -> Path:
        """Write the model as a program of ``torch.export`` to a ``.pt2`` file; return its path.

        Raises UsageError, also if PyTorch cannot export the model, and JobError.
        """
        from mnist_ray.tools.export import export

        return export(find(self), build(ExportConfig, {"output": output}))

    def __str__(self) -> str:
        return f"{self.name}: {self.workload.format(self.metrics)} on the test set"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"

    def _repr_html_(self) -> str:
        page = html.escape(self.folder.read_text(REPORT_FILE) or str(self))
        return f'<iframe sandbox srcdoc="{page}" width="100%" height="{_REPORT_HEIGHT}" frameborder="0"></iframe>'


@dataclass(frozen=True, repr=False)
class SweptRun(Run):
    """A sweep, with the run of its best configuration as its result."""

    best: dict[str, Any]  # the searched settings' values in the best configuration
    trials: list[dict[str, Any]]  # the rows of members.csv, one per trial


@process.left_as_found()
def train(workload: AnyWorkload = None, settings: object = None, **keywords: Unpack[TrainKeywords]) -> Run:
    """Train, evaluate and report like ``jobs/train.py``; return the run.

    ``workload``: a class, or a string as for ``--workload``; default: MNIST. ``settings``: the workload's own, as an
    instance of its ``Settings``; they may also be keywords, but type checkers do not know these. Raises UsageError,
    JobError, and, after Ctrl-C, KeyboardInterrupt.
    """
    return _run(run_job(read_train(_given(workload, settings, keywords))).job)


@process.left_as_found()
def tune(workload: AnyWorkload = None, settings: object = None, **keywords: Unpack[TuneKeywords]) -> SweptRun:
    """Search settings, and evaluate the best configuration once, like ``jobs/tune.py``; return the sweep.

    ``sweep`` may be a dict: ``{"width": [8, 32], "learning_rate": "log:1e-3:1e-1"}``. Raises the errors of ``train``.
    """
    if isinstance(searched := keywords.get("sweep"), Mapping):
        keywords["sweep"] = [f"{name}={_space_text(space)}" for name, space in searched.items()]
    many = run_job(read_sweep(_given(workload, settings, keywords)))
    run = _run(many.job)
    best = many.job.run.require_json(BEST_FILE)
    return SweptRun(**vars(run), best={name: best[name] for name in many.space.spaces}, trials=many.table().rows)


def _space_text(space: Any) -> str:
    return space if isinstance(space, str) else options_text(space if isinstance(space, Iterable) else [space])


@process.left_as_found()
def evaluate(
    run: Run | str | Path | None = None,
    *,
    workload: AnyWorkload = None,
    storage_path: str | Path | None = None,
    num_tasks: int | None = EvaluationConfig().num_tasks,
    use_gpu: str = EvaluationConfig().use_gpu,
    plain_ray: bool = False,
    **settings: Any,
) -> dict[str, float]:
    """Evaluate a run's checkpoint on the test set, like ``jobs/evaluate.py``; return loss and metrics.

    ``run``: a run, its name, or a checkpoint's path; default: the newest run.
    ``settings``: changes to the workload's settings, e.g. the path of different data. Raises UsageError and JobError.
    """
    config = build(EvaluationConfig, {"num_tasks": num_tasks, "use_gpu": use_gpu, "plain_ray": plain_ray})
    environment.prepare(verbose=False, plain=plain_ray)
    with prepared_forking("mnist_ray.run.evaluate", *environment.IMPORTED_LATE, is_wanted=not plain_ray) as forking:
        found = find(run, workload, storage_path, settings)
        check_known(settings, declared(found.workload.Settings), "evaluate()")

        from mnist_ray.run.evaluate import evaluate_found

        return evaluate_found(found, config, forking).values(found.workload)


def compare(first: Run | str | Path, second: Run | str | Path, *, storage_path: str | Path | None = None) -> Comparison:
    """Compare two runs like ``mnist-ray compare``; ``print`` shows the comparison. Raises UsageError, JobError."""
    from mnist_ray.tools import compare as tool

    storage_path = layers.storage_path(storage_path)
    folders = [run.folder if isinstance(run, Run) else find_run(str(run), storage_path) for run in (first, second)]
    return tool.compare(*folders)


def predict(
    pictures: Any,
    run: Run | str | Path | None = None,
    *,
    workload: AnyWorkload = None,
    storage_path: str | Path | None = None,
) -> list[Prediction]:
    """Return a ``Prediction`` for each image; its ``top`` has pairs (prediction, probability), best first.

    ``pictures``: the path of an image or folder, a Pillow image, a list of paths or of images, or an array or list of
    inputs (arrays, tensors, dicts) in the format of the workload's data; if the workload takes no images, also texts.
    ``run``: as for ``evaluate``. Raises UsageError, and JobError for the first image that cannot be used, with the
    line that ``mnist-ray predict`` prints.
    """
    if getattr(pictures, "shape", None) == ():
        raise UsageError("predict() takes several inputs, (N, ...), not a single number")
    predictor = load_predictor(run, workload=workload, storage_path=storage_path, device="cpu")
    is_list, are_inputs = isinstance(pictures, (list, tuple)), hasattr(pictures, "shape")
    listed = pictures if is_list or are_inputs else [pictures]
    if predictor.takes != "pictures":
        are_inputs = are_inputs or all(isinstance(item, str) and not Path(item).exists() for item in listed)
    if is_list:
        are_inputs = are_inputs or any(
            hasattr(item, "shape") or isinstance(item, (dict, list, tuple)) for item in listed
        )
    if are_inputs:
        return predictor.predict(listed)

    from mnist_ray.tools import predict as tool  # imports torch

    predictions = list(tool.predict_files(predictor, tool.find_files(listed)))
    for index, prediction in enumerate(predictions):
        if prediction.error is not None:
            raise JobError(f"{prediction.file or f'pictures[{index}]'}: {prediction.error}")
    return predictions


def load_predictor(
    run: Run | str | Path | None = None,
    *,
    workload: AnyWorkload = None,
    storage_path: str | Path | None = None,
    device: str = "auto",
) -> Predictor:
    """Load a run's model once, for many predictions.

    ``run``: as for ``evaluate``. ``device``: such as ``cpu`` or ``cuda:1``; ``auto``: the GPU, if PyTorch can use one.
    Raises UsageError and JobError.
    """
    from mnist_ray.predictions.predictor import Predictor  # imports torch

    return Predictor.of(find(run, workload, storage_path), device)


def load_run(
    run: str | Path | None = None, *, workload: AnyWorkload = None, storage_path: str | Path | None = None
) -> Run:
    """Return a trained and tested run by its name or path; default: the newest run. Raises UsageError and JobError."""
    storage_path = layers.storage_path(storage_path)
    folder = find_run(None if run is None else str(run), storage_path)
    result, reference = folder_of_result(folder), None if workload is None else reference_of(workload)
    return _finished(folder, workload_of(result, reference, storage_path, folder))


def _run(job: Job) -> Run:
    if job.output.dry_run:
        raise JobError(
            f"the dry run of {job.run.name} is done; dry_run=True trains nothing, so there is no run to return"
        )
    workload_class = type(job.workload)
    settings: Any = build(workload_class.Settings, settings_of(folder_of_result(job.run)))  # of a sweep, the best ones
    return _finished(job.run, workload_class(settings, job.workload.metadata))


def _finished(folder: RunFolder, workload: Workload) -> Run:
    if (result := folder.read_json(RESULT_FILE)) is None:
        raise UsageError(f"run {folder.uri} is not finished: it has no {RESULT_FILE} yet")
    return Run(folder, workload, result)


def _given(workload: AnyWorkload, settings: object, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings, with the checkpoint for a Run, and a reference to the workload. Raises UsageError."""
    if settings is not None and not (is_dataclass(settings) and not isinstance(settings, type)):
        raise UsageError(f"settings must be an instance of the workload's Settings, not {settings!r:.40}")
    own = {} if settings is None else values_of(settings)
    if twice := sorted(own.keys() & keywords.keys()):
        raise UsageError(f"{twice[0]} is in settings and a keyword; leave one of them out")
    given = {name: value.checkpoint if isinstance(value, Run) else value for name, value in keywords.items()} | own
    if workload is None:
        return given
    return given | {"workload": reference_of(workload, is_here=given.get("num_workers") == 0)}


def find(
    run: Run | str | Path | None,
    workload: AnyWorkload = None,
    storage_path: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Found:
    """Find a run's checkpoint and its workload like ``checkpoints.find.find``."""
    from mnist_ray.checkpoints.find import find as find_checkpoint  # imports torch

    if isinstance(run, Run):
        workload, run = workload or type(run.workload), run.checkpoint
    if not isinstance(run, str | Path | None):
        raise UsageError(f"a run must be given by its name, its path or a Run, not as {run!r}")
    storage_path = layers.storage_path(storage_path)
    reference = None if workload is None else reference_of(workload)
    return find_checkpoint(None if run is None else str(run), storage_path, reference, changes)


def reference_of(workload: type[Workload] | str | Path, *, is_here: bool = False) -> Reference:
    """Return a reference by which other processes can load a workload's class: its file or module, and its name.

    Raises UsageError for anything else, and for a class that only this process has. If ``is_here``, no
    other process needs the class, and the class itself is returned.
    """
    if isinstance(workload, (str, Path)):
        return str(workload)
    if not (isinstance(workload, type) and issubclass(workload, Workload)):
        raise UsageError(f"--workload must be a class derived from Workload, a file or a module, not {workload!r}")
    if "source" in vars(workload):
        return workload.source.reference if workload.source.path else workload
    module, name = sys.modules[workload.__module__], workload.__module__
    file = getattr(module, "__file__", None)
    # From a notebook's cell, from code piped into Python, or from a function.
    if file is None or not Path(file).is_file() or "<locals>" in workload.__qualname__:
        if is_here:
            return workload
        raise UsageError(
            f"{workload.__name__} is in a notebook's cell or a function, where other processes cannot find it: write "
            f"it to a file (%%writefile {workload.__name__.lower()}.py) and give the file's name, or use num_workers=0"
        )
    if name == "__main__" and (spec := getattr(module, "__spec__", None)) is not None:  # of python -m
        name = spec.name
    if "." in name:
        return f"{name}:{workload.__qualname__}"
    return f"{Path(inspect.getfile(workload)).resolve()}:{workload.__qualname__}"
