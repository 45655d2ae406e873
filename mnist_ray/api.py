"""The commands as functions, for scripts and notebooks: ``from mnist_ray import train, tune, evaluate, predict``.

Settings are keyword arguments, named and checked like the commands' flags: ``train(num_workers=2, width=64)``. Errors
are raised as UsageError or JobError, with the message that a command would print.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from mnist_ray import layers, process
from mnist_ray.cluster import environment
from mnist_ray.config import EvaluationConfig, WorkerConfig
from mnist_ray.errors import JobError, UsageError
from mnist_ray.job.job import Job
from mnist_ray.many.jobs import read_sweep, read_train
from mnist_ray.many.jobs import run as run_job
from mnist_ray.many.points import options_text
from mnist_ray.report.run_files import Run, folder_of_result, settings_of, workload_of
from mnist_ray.runs import find_run
from mnist_ray.settings import build, values_of
from mnist_ray.workload.base import Workload
from mnist_ray.workload.loading import reference_of

if TYPE_CHECKING:
    from mnist_ray.checkpoints.find import Found
    from mnist_ray.keywords import TrainKeywords, TuneKeywords
    from mnist_ray.predictions.predictor import Prediction, Predictor
    from mnist_ray.tools.compare import Comparison

AnyWorkload = type[Workload] | str | Path | None  # a class, or a value of --workload; None: MNIST or the run's workload


@process.left_as_found()
def train(workload: AnyWorkload = None, settings: object = None, **keywords: Unpack[TrainKeywords]) -> Run:
    """Train, evaluate and report like ``jobs/train.py``; return the run.

    ``workload``: a class, or a string as for ``--workload``; default: MNIST. ``settings``: the workload's own, as an
    instance of its ``Settings``; they may also be keywords, but type checkers do not know these. Raises UsageError,
    JobError, and, after Ctrl-C, KeyboardInterrupt.
    """
    return _run_of(run_job(read_train(_given(workload, settings, keywords))).job)


@process.left_as_found()
def tune(workload: AnyWorkload = None, settings: object = None, **keywords: Unpack[TuneKeywords]) -> Run:
    """Search settings, and evaluate the best configuration once, like ``jobs/tune.py``; return the sweep.

    ``sweep`` may be a dict: ``{"width": [8, 32], "learning_rate": "log:1e-3:1e-1"}``. Raises the errors of ``train``.
    """
    if isinstance(searched := keywords.get("sweep"), Mapping):
        keywords["sweep"] = [f"{name}={options_text(space)}" for name, space in searched.items()]
    return _run_of(run_job(read_sweep(_given(workload, settings, keywords))).job)


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
    with environment.prepared(WorkerConfig(plain_ray=plain_ray), "mnist_ray.run.evaluate") as forking:
        found = find(run, workload, storage_path, settings)
        from mnist_ray.run.evaluate import evaluate_found

        return evaluate_found(found, config, forking).values(found.workload)


def compare(first: Run | str | Path, second: Run | str | Path, *, storage_path: str | Path | None = None) -> Comparison:
    """Compare two runs like ``mnist-ray compare``; ``print`` shows the comparison. Raises UsageError, JobError."""
    from mnist_ray.tools import compare as tool

    storage_path = layers.storage_path(storage_path)
    runs = [run if isinstance(run, Run) else Run(find_run(str(run), storage_path)) for run in (first, second)]
    return tool.compare(*runs)


def predict(
    inputs: Any,
    run: Run | str | Path | None = None,
    *,
    workload: AnyWorkload = None,
    storage_path: str | Path | None = None,
) -> list[Prediction]:
    """Return a ``Prediction`` for each input; its ``top`` has pairs (prediction, probability), best first.

    ``inputs``: an image, as a path or a Pillow image, if the workload takes images; else a text; or several of these.
    Or inputs in the format of the workload's data: an array, (N, ...), or a list of arrays, tensors or dicts.
    ``run``: as for ``evaluate``. Raises UsageError, and JobError for the first image that cannot be used.
    """
    predictor = load_predictor(run, workload=workload, storage_path=storage_path, device="cpu")
    is_one = isinstance(inputs, (str, Path, dict)) or hasattr(inputs, "convert")  # of Pillow
    return predictor.predict(map(predictor.opened, [inputs] if is_one else inputs))


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
    found = Run(folder, workload_of(result, reference, storage_path, folder))
    found.check_tested()
    return found


def _run_of(job: Job) -> Run:
    """Return a job's run, with the workload's settings that were tested. Raises JobError after a dry run."""
    if job.output.dry_run:
        raise JobError("the dry run is done; dry_run=True trains nothing, so there is no run to return")
    workload_class = type(job.workload)
    settings: Any = build(workload_class.Settings, settings_of(folder_of_result(job.run)))  # of a sweep, the best ones
    return Run(job.run, workload_class(settings, job.workload.metadata))


def _given(workload: AnyWorkload, settings: object, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings, with the checkpoint for a Run, and a reference to the workload. Raises UsageError."""
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
    """Find a run's checkpoint and its workload like ``checkpoints.find.find``; ``changes`` are of its settings."""
    from mnist_ray.checkpoints.find import find as find_checkpoint  # imports torch

    if isinstance(run, Run):
        workload, run = workload or type(run.workload), run.checkpoint
    if not isinstance(run, str | Path | None):
        raise UsageError(f"a run must be given by its name, its path or a Run, not as {run!r}")
    reference, place = None if workload is None else reference_of(workload), None if run is None else str(run)
    return find_checkpoint(place, layers.storage_path(storage_path), reference, changes)
