"""Evaluation of checkpoints: as Ray tasks, or in this process."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from mnist_ray.checkpoints.find import Found, load_model
from mnist_ray.checkpoints.state_file import read_state
from mnist_ray.cluster.connection import Connection
from mnist_ray.cluster.devices import device_here
from mnist_ray.cluster.nodes import Waiting
from mnist_ray.cluster.plan import WorkerPlan, cpus_for_each, plan_workers
from mnist_ray.cluster.remote_data import RemoteSplit, share
from mnist_ray.config import EvaluationConfig, TrainConfig, WorkerConfig
from mnist_ray.data.data import Split
from mnist_ray.data.sampler import split_bounds
from mnist_ray.data.splits import splits_of
from mnist_ray.data.tensors import with_fast_layout
from mnist_ray.errors import ExampleError, JobError, UsageError, first_line
from mnist_ray.process import usable_cores
from mnist_ray.report.console import RunConsole
from mnist_ray.schema import RESULT_FILE
from mnist_ray.settings import build
from mnist_ray.signals import if_ended
from mnist_ray.storage import STORAGE_ERRORS, RunFolder
from mnist_ray.text import count
from mnist_ray.training.evaluation import evaluate
from mnist_ray.training.metrics import Evaluation
from mnist_ray.workload.base import Workload
from mnist_ray.workload.calls import data_of, placed
from mnist_ray.workload.figures import IN_WORDS
from ray_fork.starting import Forking

if TYPE_CHECKING:  # the process of an evaluation does not need these
    from mnist_ray.job.session import Session
    from mnist_ray.record.recorder import Recorder


def evaluate_found(found: Found, config: EvaluationConfig, forking: Forking) -> Evaluation:
    """For ``jobs/evaluate.py``: connect, test, print and return the result. Raises the same exceptions as ``train``."""
    workload, data = found.workload, data_of(found.workload)
    config_of_run = build(TrainConfig, read_state(found.checkpoint).get("config", {}))
    splits = splits_of(data, config_of_run.validation_size if data.test is None else 0)
    test, evaluated = splits.test, splits.evaluated
    if len(test) == 0:
        raise UsageError(f"{data.name} has neither a test nor a validation set")
    workers = WorkerConfig(plain_ray=config.plain_ray, use_gpu=config.use_gpu)
    console = RunConsole(workload, 0, quiet=False)
    note = functools.partial(console.say, "note")
    with console, Connection(workers, forking).opened(note) as cluster:
        plan = plan_workers(workers, cluster)
        for text in found.notes:
            note(text)
        console.say("checkpoint", found.checkpoint.path)
        console.say("data", f"{data.name}: {len(test):,} {IN_WORDS[evaluated]} {workload.nouns}")
        number = config.num_tasks or plan.num_workers
        free = int(ray.available_resources().get("CPU", 0)) // number  # another job may have the others
        cpus = max(1, min(cpus_for_each(cluster.nodes, number, None, plan.use_gpu) or 1, free))
        of_tasks = replace(plan, num_workers=number, cpus_per_worker=cpus)
        tested = evaluate_in_tasks(workload, found.checkpoint, test, of_tasks, 0, console)
        console.show_evaluation(tested, evaluated)
        for text in tested.notes(test, workload.nouns):
            note(text)
        return tested


def evaluate_fitted(
    session: Session, plan: WorkerPlan, record: Recorder, checkpoint: RunFolder, *, is_last: bool = True
) -> None:
    """Evaluate a checkpoint on the test set or, without one, on the validation set; record the result.

    ``is_last``: nothing needs the cluster afterwards; disconnect while the report is written.
    """
    job, test = session.job, session.data.test
    record.begin_test(checkpoint)
    session.console.waiting("evaluating …")
    loader_workers = job.workers.loader_workers
    if session.is_here:
        tested = evaluate_here(checkpoint, job.workload, test, loader_workers, "cuda" if plan.use_gpu else "cpu")
    else:
        tested = evaluate_in_tasks(job.workload, checkpoint, test, plan, loader_workers, session.console)
    if is_last:
        session.leave()
    record.add_test(checkpoint, tested)
    if is_last:
        if_ended(f"; the run is finished: {job.run.inside(RESULT_FILE).uri}")


def evaluate_in_tasks(
    workload: Workload, checkpoint: RunFolder, test: Split, plan: WorkerPlan, loader_workers: int, console: RunConsole
) -> Evaluation:
    """Evaluate a checkpoint on a set in a task for each worker of ``plan``, with a worker's CPUs and GPU.

    The result does not depend on the number of tasks, because each evaluates whole batches. Raises a task's exception,
    or JobError if a task's node or the storage is lost.
    """
    shared = share(workload, test)
    # Ray ends the process after such a GPU task; with options(num_gpus=1), the process would keep the GPU's memory.
    options = {"num_cpus": plan.cpus_per_worker, "num_gpus": int(plan.use_gpu)}
    # DEFAULT: not among the resources that Tune has reserved for the process of a trial.
    task = ray.remote(scheduling_strategy="DEFAULT", **options)(_evaluate_split)
    bounds = split_bounds(len(test), plan.num_workers, workload.evaluation_batch_size(on_gpu=plan.use_gpu))
    streams = [task.remote(checkpoint, shared, *own, loader_workers, plan.cpus_per_worker) for own in bounds]
    needed = count(plan.cpus_per_worker, "CPU") + " and 1 GPU" * plan.use_gpu
    waiting, has_begun = Waiting(needed, functools.partial(console.say, "note")), False
    parts: dict[Any, Evaluation] = {}
    try:
        while len(parts) < len(streams):
            ready, _ = ray.wait([stream for stream in streams if stream not in parts], timeout=1)
            has_begun = has_begun or bool(ready)
            waiting.look(is_waiting=not has_begun)
            for stream in ready:
                evaluation = ray.get(next(stream))
                if evaluation is not None:
                    parts[stream] = evaluation
        return Evaluation.merge([parts[stream] for stream in streams])
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, RayError):
            raise JobError(f"the evaluation was lost: {first_line(cause)}") from error
        raise cause from error  # the task's own exception, whose text is one line


def _evaluate_split(
    checkpoint: RunFolder, shared: RemoteSplit, start: int, stop: int, loader_workers: int, cpus: int
) -> Iterator[Evaluation | None]:
    """Yield None when the task begins; then the evaluation."""
    yield None
    torch.set_num_threads(min(cpus, usable_cores()))
    split = shared.open().take(slice(start, stop))
    yield evaluate_here(checkpoint, shared.workload, split, loader_workers, device_here())


def evaluate_here(
    checkpoint: RunFolder, workload: Workload, split: Split, loader_workers: int, device: str | torch.device = "cpu"
) -> Evaluation:
    """Evaluate a checkpoint in this process."""
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    try:
        with placed(workload, "an evaluation"):
            model = with_fast_layout(load_model(checkpoint, workload).to(device))
            config = build(TrainConfig, read_state(checkpoint).get("config", {}))
            return evaluate(workload, model, split, config, loader_workers)
    except UsageError as error:
        if isinstance(error.__cause__, (*STORAGE_ERRORS, ExampleError)):  # the user may fix the data
            raise JobError(str(error)) from error
        raise
