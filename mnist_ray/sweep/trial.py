"""One trial of a sweep: a training run that reports to Ray Tune."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

import ray.train
from ray import tune
from ray.train import UserCallback
from ray.util.queue import Empty, Queue

from mnist_ray.cluster.devices import device_here
from mnist_ray.cluster.nodes import temporary_folder
from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.cluster.remote_data import RemoteSplit
from mnist_ray.errors import JobError, TrainingStoppedError
from mnist_ray.job.job import Job
from mnist_ray.parallel.group import Group
from mnist_ray.process import in_thread
from mnist_ray.run.failures import FailureCallback, cause_of, code_failures_placed, reason_of
from mnist_ray.run.trainer import create_trainer
from mnist_ray.run.worker import LoopSpec, TrialSink, train_worker
from mnist_ray.storage import RunFolder
from mnist_ray.sweep.space import Point
from mnist_ray.training.state import StopWantedError

_WAIT_S = 0.1  # for a report, before looking whether the training has ended


@dataclass(frozen=True)
class TrialSpec:
    """Everything that all trials share."""

    job: Job  # the sweep's job; each trial replaces the searched settings
    train: RemoteSplit
    validation: RemoteSplit
    plan: WorkerPlan
    folder: RunFolder  # holds the trials' folders


def run_trial(tune_config: dict[str, Any], spec: TrialSpec) -> None:
    """Train one point from its last checkpoint to an epoch, and report to Tune at every checkpoint.

    With several workers, the trial is a ``TorchTrainer`` run. With one worker, the engine runs in this process, which
    Tune reuses for the next trial: starting a worker takes longer than a small trial's training.

    A failure that would happen again is reported. Other failures are raised, and Tune retries the trial.
    """
    point = Point(tuple(tune_config["values"].items()), tune_config["seed"])
    until_epoch = tune_config["until_epoch"]
    try:
        with code_failures_placed(*spec.job.code_folders):
            job = spec.job.with_values({**point.values, "seed": point.seed})
            job = dataclasses.replace(job, run=spec.folder.inside(point.name))
            loop_spec = LoopSpec(
                job=job, train=spec.train, validation=spec.validation, until_epoch=until_epoch, is_trial=True
            )
            if spec.plan.num_workers > 1:
                train_on_workers(loop_spec, spec.plan)
            else:
                train_worker(loop_spec, Group(device=device_here()), TrialSink(tune.report), spec.plan.cpus_per_worker)
        return
    except StopWantedError:  # the segment ends before the training
        return
    except TrainingStoppedError as error:
        reason = str(error)
    tune.report({f"val_{spec.job.workload.monitor.name}": math.nan, "reason": reason})


def train_on_workers(loop_spec: LoopSpec, plan: WorkerPlan) -> None:
    """Train a trial as a ``TorchTrainer`` run, whose reports this thread passes on to Tune.

    Ray's own ``TuneReportCallback`` reports from another thread. If this one reports at that moment, both wait forever.
    """
    reports = Queue(actor_options={"num_cpus": 0})
    callbacks = [_ReportCallback(reports), FailureCallback(None)]
    with temporary_folder() as folder:
        fitted = in_thread(create_trainer(loop_spec, plan, folder, max_failures=0, callbacks=callbacks).fit)
        try:
            while not fitted.done() or not reports.empty():
                with contextlib.suppress(Empty):
                    tune.report(reports.get(timeout=_WAIT_S))
            fitted.result()
        except SystemExit:  # Tune stops the trial, and will end this process with all that it has started
            wait([fitted])
            raise
        except ray.train.TrainingFailedError as error:
            cause = cause_of(error)
            raise (cause if isinstance(cause, TrainingStoppedError) else JobError(reason_of(error))) from error


class _ReportCallback(UserCallback):
    """Puts what rank 0 reports into a queue."""

    def __init__(self, reports: Queue) -> None:
        self._reports = reports

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._reports.put(metrics[0])
