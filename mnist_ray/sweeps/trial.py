"""One trial of a sweep: a training run whose figures go to Ray Tune."""

from __future__ import annotations

import dataclasses
import faulthandler
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from mnist_ray.cluster.connection import WorkerPlan, threads_per_worker, usable_cores
from mnist_ray.config import TrainConfig
from mnist_ray.environment import end_if_hung, keep_freed_memory
from mnist_ray.errors import JobError
from mnist_ray.runs import trainer
from mnist_ray.storage import RunFolder, locate
from mnist_ray.sweeps.search import Point
from mnist_ray.training import checkpoint as checkpoints
from mnist_ray.training import engine
from mnist_ray.training.engine import Group, Hooks, TrainingState
from mnist_ray.training.metrics import Progress


@dataclass(frozen=True)
class TrialSpec:
    """What every trial is handed."""

    config: TrainConfig
    """Of the sweep: a trial replaces what is searched."""
    train: ray.ObjectRef
    validation: ray.ObjectRef
    """The images, in the object store: trials on one node share one copy."""
    plan: WorkerPlan
    storage_path: str
    """Where the trials' folders are."""
    about: dict[str, Any]
    hang_timeout_s: float


def run_trial(tune_config: dict[str, Any], spec: TrialSpec) -> None:
    """Train one point, from its last checkpoint where it has one, and report to Tune at every checkpoint.

    With several workers it is a ``TorchTrainer`` run; with one it is the same engine in this process, which Tune
    keeps warm from trial to trial: starting workers costs more than such a trial's training.
    """
    point = Point(tune_config["batch_size"], tune_config["learning_rate"], tune_config["seed"])
    config = point.applied_to(spec.config)
    folder = locate(spec.storage_path, point.name)
    if spec.plan.num_workers > 1:
        _train_on_workers(config, spec, folder)
    else:
        _train_here(config, spec, folder)


def _train_on_workers(config: TrainConfig, spec: TrialSpec, folder: RunFolder) -> None:
    loop_spec = trainer.LoopSpec(config, spec.train, folder, None, spec.about, spec.hang_timeout_s, spec.validation)
    trainer.drop_damaged_snapshot(folder)
    run = trainer.create_trainer(loop_spec, spec.plan, max_failures=0, callbacks=[TuneReportCallback()])
    result = run.fit()
    if result.return_value is not None:
        raise JobError(result.return_value)


def _train_here(config: TrainConfig, spec: TrialSpec, folder: RunFolder) -> None:
    keep_freed_memory()
    torch.set_num_threads(threads_per_worker(spec.plan.cpus_per_worker, usable_cores(), 1, config.batch_size))
    group = Group(device=torch.device("cuda" if spec.plan.use_gpu else "cpu"))
    config = dataclasses.replace(config, precision=engine.resolve_precision(config.precision, group))
    split, validation = ray.get([spec.train, spec.validation])
    state = engine.create_state(config, len(split), group.device)
    restored = checkpoints.restore_newest(folder, state)
    if state.epoch == config.num_epochs:  # killed after its last checkpoint, before the sweep had noted it
        tune.report(restored.metrics)

    def report(state: TrainingState, progress: Progress) -> None:
        faulthandler.cancel_dump_traceback_later()  # what Tune takes its time for is no hang
        metrics = trainer.report_metrics(state, progress, validation)
        _save(folder, state, spec.about | {"metrics": metrics})
        tune.report(metrics)

    hooks = Hooks(progress=lambda progress: end_if_hung(spec.hang_timeout_s), checkpoint=report)
    end_if_hung(spec.hang_timeout_s)
    try:
        engine.train(state, split, config, group, hooks)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _save(folder: RunFolder, state: TrainingState, about: dict[str, Any]) -> None:
    """Write a trial's checkpoint, then remove those before it: at any time a whole one is there."""
    target = folder.inside(trainer.checkpoint_name(state))
    with tempfile.TemporaryDirectory() as local:
        checkpoints.save_checkpoint(Path(local), state, about)
        target.upload(local)
    for name in folder.subfolders():
        if name < target.name:
            folder.inside(name).delete()
