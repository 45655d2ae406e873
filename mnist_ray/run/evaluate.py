"""Evaluation of checkpoints: as Ray tasks, or in this process."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from mnist_ray import extras
from mnist_ray.checkpoints.checkpoint import read_state
from mnist_ray.checkpoints.saved_model import load_model
from mnist_ray.cluster.connect import connect
from mnist_ray.cluster.devices import device_here, without_unusable_gpus
from mnist_ray.cluster.remote_data import RemoteSplit, share
from mnist_ray.cluster.waiting import Waiting
from mnist_ray.config import EvaluationConfig, TrainConfig, WorkerConfig
from mnist_ray.data.data import Split
from mnist_ray.data.sampler import split_bounds
from mnist_ray.data.tensors import with_fast_layout
from mnist_ray.errors import ExampleError, JobError, UsageError, first_line
from mnist_ray.job.find import Found
from mnist_ray.report.console import RunConsole
from mnist_ray.settings import build, flag
from mnist_ray.signals import if_ended
from mnist_ray.storage import RESULT_FILE, STORAGE_ERRORS, RunFolder
from mnist_ray.training.evaluation import evaluate
from mnist_ray.training.metrics import Evaluation
from mnist_ray.workload.base import Workload
from mnist_ray.workload.calls import data_of, placed
from ray_fork.starting import Forking

if TYPE_CHECKING:  # the process of an evaluation does not need these
    from mnist_ray.cluster.plan import WorkerPlan
    from mnist_ray.job.find import Fitted
    from mnist_ray.job.session import Session
    from mnist_ray.record.recorder import Recorder


def evaluate_found(found: Found, config: EvaluationConfig, forking: Forking) -> Evaluation:
    """For ``jobs/evaluate.py``: connect, test, print and return the result. Raises the same exceptions as ``train``."""
    workload, data = found.workload, data_of(found.workload)
    test = Split(data.test, origin="test")
    workers = WorkerConfig(plain_ray=config.plain_ray)
    with connect(workers, forking) as cluster, RunConsole(workload, 0, quiet=False) as console:
        use_gpu = config.use_gpu == "yes"
        if config.use_gpu == "auto" and ray.available_resources().get("GPU", 0) >= 1:
            warn = functools.partial(console.say, "note")
            use_gpu = any(node.num_gpus for node in without_unusable_gpus(cluster, warn).nodes)
        elif use_gpu and cluster.is_local and not any(node.num_gpus for node in cluster.nodes):
            raise UsageError("--use-gpu yes, but this machine has no GPU; use --use-gpu no")
        for note in filter(None, (*cluster.notes, extras.note(plain=config.plain_ray), *found.notes)):
            console.say("note", note)
        for name, whole in (("limit", 1.0), ("overfit_batches", None)):
            if (part := found.config.get(name, whole)) != whole:
                console.say("note", f"the run was tested with {flag(name)} {part}; this evaluation uses all data")
        console.say("checkpoint", found.checkpoint.path)
        console.say("data", f"{data.name}: {len(test):,} test {workload.nouns}")
        tested = evaluate_in_tasks(workload, found.checkpoint, test, config.num_tasks, 0, use_gpu, console)
        console.show_evaluation(tested)
        return tested


def evaluate_fitted(
    session: Session, plan: WorkerPlan, record: Recorder, fitted: Fitted, *, is_last: bool = True
) -> float:
    """Evaluate the fitted checkpoint on the test set, and record the result. Return the monitored value.

    ``is_last``: nothing needs the cluster afterwards; disconnect while the report is written.
    """
    job, test = session.job, session.data.test
    record.begin_test(fitted)
    if session.is_here:
        device = "cuda" if plan.use_gpu else "cpu"
        tested = evaluate_here(fitted.checkpoint, job.workload, test, job.workers.loader_workers, device)
    else:
        tested = evaluate_in_tasks(
            job.workload,
            fitted.checkpoint,
            test,
            num_tasks=1,
            loader_workers=job.workers.loader_workers,
            use_gpu=plan.use_gpu,
            console=session.console,
            labels=plan.labels,
        )
    if is_last:
        session.cluster.leave()
    record.add_test(fitted, tested)
    if is_last:
        if_ended(f"; the run is finished: {job.run.inside(RESULT_FILE).uri}")
    return tested.values(job.workload)[job.workload.monitor.name]


def evaluate_in_tasks(
    workload: Workload,
    checkpoint: RunFolder,
    test: Split,
    num_tasks: int,
    loader_workers: int,
    use_gpu: bool,
    console: RunConsole,
    labels: Mapping[str, str] | None = None,
) -> Evaluation:
    """Evaluate a checkpoint on the test set, divided among tasks with one CPU and, if ``use_gpu``, one GPU each.

    ``labels``: the node labels that the tasks require. The result does not depend on the number of tasks, because each
    evaluates whole batches. Raises a task's exception, or JobError if a task's node or the storage is lost.
    """
    shared = share(workload, test)
    # Ray ends the process after such a GPU task; with options(num_gpus=1), the process would keep the GPU's memory.
    selector = {"label_selector": dict(labels)} if labels else {}
    task = ray.remote(num_cpus=1, num_gpus=int(use_gpu), **selector)(_evaluate_split)
    bounds = split_bounds(len(test), num_tasks, workload.evaluation_batch_size(on_gpu=use_gpu))
    splits = [task.remote(checkpoint, shared, start, stop, loader_workers) for start, stop in bounds]
    waiting = Waiting("1 CPU and 1 GPU" if use_gpu else "1 CPU", functools.partial(console.say, "note"))
    while splits and not ray.wait(splits, timeout=1)[0]:  # until a task has begun
        waiting.look()
    try:
        return Evaluation.merge([ray.get([*split][-1]) for split in splits])
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, RayError):
            raise JobError(f"the evaluation was lost: {first_line(cause)}") from error
        raise cause from error  # the task's own exception, whose text is one line


def start_process() -> None:
    """Start an evaluation's process early, so that it imports torch while the workers start."""
    _import_this.remote()


@ray.remote(num_cpus=0)
def _import_this() -> None:
    importlib.import_module(__name__)


def _evaluate_split(
    checkpoint: RunFolder, shared: RemoteSplit, start: int, stop: int, loader_workers: int
) -> Iterator[Evaluation | None]:
    yield None  # the task has begun
    split = shared.open().between(start, stop)
    yield evaluate_here(checkpoint, shared.workload, split, loader_workers, device_here())


def evaluate_here(
    checkpoint: RunFolder, workload: Workload, split: Split, loader_workers: int, device: str | torch.device = "cpu"
) -> Evaluation:
    """Evaluate a checkpoint in this process, on one thread, since a task has one CPU."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # an evaluation is in fp32
    try:
        with placed(workload, "an evaluation"):
            model = with_fast_layout(load_model(checkpoint, workload).to(device))
            config = build(TrainConfig, read_state(checkpoint).get("config", {}))
            return evaluate(workload, model, split, config, loader_workers)
    except UsageError as error:
        if isinstance(error.__cause__, (*STORAGE_ERRORS, ExampleError)):  # the user may fix the data
            raise JobError(str(error)) from error
        raise
