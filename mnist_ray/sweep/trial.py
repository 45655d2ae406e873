"""One trial of a sweep: a training run whose figures go to Ray Tune."""

from __future__ import annotations

import dataclasses
import faulthandler
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from mnist_ray.cluster.environment import end_if_hung, keep_freed_memory
from mnist_ray.cluster.plan import WorkerPlan, threads_per_worker, usable_cores
from mnist_ray.cluster.remote_data import RemoteSplit
from mnist_ray.errors import JobError, with_place
from mnist_ray.run.failures import PASSING, CodeFailedError, FailureReporter, TrainingStoppedError, reason_of
from mnist_ray.run.fit import create_trainer, drop_damaged_snapshot
from mnist_ray.run.job import Job, about
from mnist_ray.run.worker import LoopSpec, callbacks_of, report_metrics, validate
from mnist_ray.storage import RunFolder, checkpoint_name, position_of
from mnist_ray.sweep.space import Point
from mnist_ray.training import checkpoint as checkpoints
from mnist_ray.training import engine
from mnist_ray.training.debug import anomalies_found
from mnist_ray.training.engine import Group, Hooks, TrainingState
from mnist_ray.training.events import Progress
from mnist_ray.workload.user_code import folders_of


@dataclass(frozen=True)
class TrialSpec:
    """What every trial is handed."""

    job: Job
    """Of the sweep: a trial replaces what is searched."""
    train: RemoteSplit
    validation: RemoteSplit
    plan: WorkerPlan
    folder: RunFolder
    """Where the trials' folders are."""


def run_trial(tune_config: dict[str, Any], spec: TrialSpec) -> None:
    """Train one point, from its last checkpoint where it has one, and report to Tune at every checkpoint.

    With several workers it is a ``TorchTrainer`` run; with one it is the same engine in this process, which Tune
    keeps warm from trial to trial: starting workers costs more than such a trial's training.

    Where the configuration or the code is at fault, that is reported as well: to do it again would end the same way.
    What may go well at the next attempt is raised, and Tune makes it.
    """
    point = Point(tuple((name, value) for name, value in tune_config.items() if name != "seed"), tune_config["seed"])
    job = spec.job.with_values({**point.values, "seed": point.seed})
    job = dataclasses.replace(job, run=spec.folder.inside(point.name))
    try:
        if spec.plan.num_workers > 1:
            train_on_workers(job, spec)
        else:
            _train_here(job, spec)
    except (CodeFailedError, TrainingStoppedError, engine.TrainingDivergedError, checkpoints.OtherModelError) as error:
        _report_failure(job, f"{type(error).__name__}: {error}")
    except PASSING:
        raise
    except Exception as error:
        _report_failure(job, with_place(error, *folders_of(job.callback, job.workload.source)))


def _report_failure(job: Job, reason: str) -> None:
    """Tell Tune that a trial has failed, which its scheduler takes for the worst."""
    tune.report({f"val_{job.workload.monitor.name}": math.nan, "reason": reason})


def train_on_workers(job: Job, spec: TrialSpec) -> None:
    """Train a trial as a ``TorchTrainer`` run."""
    loop_spec = LoopSpec(
        job.workload,
        job.train,
        spec.train,
        job.run,
        None,
        about(job),
        job.workers.hang_timeout_s,
        job.workers.loader_workers,
        validation=spec.validation,
        callback=job.callback,
        profile=job.output.profile,
        detect_anomaly=job.output.detect_anomaly,
    )
    drop_damaged_snapshot(job.run)
    callbacks = [TuneReportCallback(), FailureReporter(None)]
    try:
        result = create_trainer(loop_spec, spec.plan, max_failures=0, callbacks=callbacks).fit()
    except ray.train.TrainingFailedError as error:
        cause = getattr(error, "controller_failure", error)
        raise (cause if isinstance(cause, TrainingStoppedError) else JobError(reason_of(error))) from error
    if result.return_value is not None:
        raise TrainingStoppedError(result.return_value)


def _train_here(job: Job, spec: TrialSpec) -> None:
    workload, timeout_s, loader_workers = job.workload, job.workers.hang_timeout_s, job.workers.loader_workers
    keep_freed_memory()
    threads = threads_per_worker(spec.plan.cpus_per_worker, usable_cores(), 1, job.train.batch_size)
    torch.set_num_threads(1 if job.train.reproducible else threads)
    group = Group(device=torch.device("cuda" if spec.plan.use_gpu else "cpu"))
    config = dataclasses.replace(job.train, precision=engine.resolve_precision(job.train.precision, group))
    split, validation = spec.train.open(), spec.validation.open()
    callbacks = callbacks_of(job.callback, job.output.profile, job.run)
    state = engine.create_state(workload, config, len(split), group.device, callbacks)
    restored = checkpoints.restore_newest(job.run, state)
    if engine.is_over(state, config):  # killed after its last checkpoint, before the sweep had noted it
        tune.report(restored.metrics)

    def report(state: TrainingState, progress: Progress) -> None:
        faulthandler.cancel_dump_traceback_later()  # what Tune takes its time for is no hang
        _, validated = validate(workload, state, validation, config, group, loader_workers)
        metrics = report_metrics(workload, state, progress) | validated
        _save(job.run, state, about(job) | {"metrics": metrics})
        tune.report(metrics)

    hooks = Hooks(progress=lambda progress: end_if_hung(timeout_s), checkpoint=report)
    end_if_hung(timeout_s)
    try:
        with anomalies_found(job.output.detect_anomaly, *folders_of(job.callback, workload.source)):
            engine.train(workload, state, split, config, group, hooks, loader_workers)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _save(folder: RunFolder, state: TrainingState, about: dict[str, Any]) -> None:
    """Write a trial's checkpoint, then remove those before it: at any time a whole one is there."""
    target = folder.inside(checkpoint_name(state.epoch, state.step))
    with tempfile.TemporaryDirectory() as local:
        checkpoints.snapshot(state, about).write(Path(local))
        target.upload(local)
    for name in folder.checkpoint_names():
        if position_of(name) < position_of(target.name):
            folder.inside(name).delete()
