"""The training run on Ray: the loop that each worker runs, and ``fit`` around ``TorchTrainer``."""

from __future__ import annotations

import functools
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
    ValidationConfig,
)
from ray.train.torch import TorchTrainer, get_device
from ray.util.queue import Queue

from mnist_ray import checkpoint as checkpoints
from mnist_ray import engine, evaluation
from mnist_ray.cluster import WorkerPlan, threads_per_worker, usable_cores
from mnist_ray.config import TrainConfig
from mnist_ray.data import Split, num_steps
from mnist_ray.errors import JobError
from mnist_ray.events import EpochFinished, Event, Started
from mnist_ray.metrics import Progress
from mnist_ray.provenance import versions
from mnist_ray.storage import RunFolder


@dataclass(frozen=True)
class LoopSpec:
    """What every worker is handed."""

    config: TrainConfig
    split: ray.ObjectRef
    """The training images, in the object store: workers on one node share one copy."""
    events: Queue | None
    """Where rank 0 tells how it goes; None where nobody listens."""
    about: dict[str, Any]
    """Written into every checkpoint."""
    validation: ray.ObjectRef | None = None
    """Held-out images that rank 0 evaluates itself before it reports, as a trial of a sweep needs it."""

    @property
    def validates_in_tasks(self) -> bool:
        """Whether each epoch's checkpoint is validated by a task beside the training."""
        return self.config.validation_size > 0 and self.validation is None


class TrainingStoppedError(JobError):
    """Training cannot go on with these settings: doing it again would end the same way."""


@dataclass(frozen=True)
class FitResult:
    """What a finished run has left."""

    checkpoint: Checkpoint
    """The best by validation accuracy; the last where nothing was held out."""
    metrics: dict[str, Any]
    """Those of ``checkpoint``."""


def fit(
    spec: LoopSpec,
    plan: WorkerPlan,
    run: RunFolder,
    validation: ray.ObjectRef | None,
    max_failures: int,
    on_event: Callable[[Event], None],
) -> FitResult:
    """Train on Ray, telling ``on_event`` how it goes; a run that ``run`` holds already goes on where it stood.

    Raises TrainingStoppedError where the loss became NaN, JobError where training failed otherwise.
    """
    assert spec.events is not None
    # Without CPUs of its own, validation starts also while the workers hold all of them.
    validate = functools.partial(evaluation.validate, split=validation, events=spec.events)
    validation_config = ValidationConfig(validate, ray_remote_kwargs={"num_cpus": 0}) if validation else None
    trainer = create_trainer(spec, plan, run, max_failures, validation_config=validation_config)
    result = _wait(trainer.fit, spec.events, on_event)
    if result.return_value is not None:
        raise TrainingStoppedError(result.return_value)
    return FitResult(*evaluation.choose(result))


def create_trainer(
    spec: LoopSpec,
    plan: WorkerPlan,
    run: RunFolder,
    max_failures: int,
    *,
    validation_config: ValidationConfig | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> TorchTrainer:
    """Return the trainer that runs ``spec`` on the planned workers and keeps the best and the last checkpoint."""
    is_validated = validation_config is not None or spec.validation is not None
    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"spec": spec},
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers,
            use_gpu=plan.use_gpu,
            resources_per_worker={"CPU": plan.cpus_per_worker, **({"GPU": 1} if plan.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=run.name,
            storage_path=run.storage_path,
            checkpoint_config=CheckpointConfig(
                num_to_keep=1,  # the best; Ray keeps the last besides
                checkpoint_score_attribute="val_accuracy" if is_validated else None,
            ),
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=list(callbacks),
        ),
        validation_config=validation_config,
    )


def _wait(work: Callable[[], ray.train.Result], events: Queue, on_event: Callable[[Event], None]) -> ray.train.Result:
    """Run ``work`` in a thread, so that this one hands on events and takes Ctrl-C; return or raise what it does."""
    outcome: list[ray.train.Result | BaseException] = []

    def target() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)
        # Not get() with a timeout: it says by an exception that nothing came, and Ray logs one that Ctrl-C left.
        for event in events.get_nowait_batch(events.qsize()):
            on_event(event)
    result = outcome[0]
    if isinstance(result, ray.train.TrainingFailedError):
        raise JobError(_reason(result)) from result
    if isinstance(result, BaseException):
        raise result
    return result


def _reason(error: ray.train.TrainingFailedError) -> str:
    """Say in one line why training failed: the first worker's own exception where there is one."""
    who, failure = "Ray Train", getattr(error, "controller_failure", error)
    if failures := getattr(error, "worker_failures", None):
        rank, failure = min(failures.items())
        who = f"worker {rank}"
    cause = getattr(failure, "_base_exc", failure)
    text = str(cause).strip().splitlines()
    return f"{who} failed: {type(cause).__name__}: {text[0] if text else 'no message'}"


def train_loop_per_worker(loop_config: dict[str, LoopSpec]) -> str | None:
    """Train on one worker; every rank runs this. Return why training stopped early, or None where it is done."""
    spec = loop_config["spec"]
    context = ray.train.get_context()
    group = engine.Group(context.get_world_rank(), context.get_world_size(), get_device())
    assigned_cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(threads_per_worker(assigned_cpus, usable_cores(), context.get_local_world_size()))
    split = ray.get(spec.split)

    state = engine.create_state(spec.config, len(split), group.device)
    last_checkpoint = ray.train.get_checkpoint()
    if last_checkpoint:
        with last_checkpoint.as_directory() as folder:
            checkpoints.restore(Path(folder), state)
    config = replace(spec.config, precision=engine.resolve_precision(spec.config.precision, group))

    send: Callable[[Event], Any] = _ignore
    if group.rank == 0 and spec.events is not None:  # a Queue with nothing in it is false
        send = spec.events.actor.put_nowait.remote
    hosts = _hosts(group)
    send(
        Started(
            group.world_size,
            hosts,
            torch.get_num_threads(),
            group.device.type,
            config.precision,
            state.epoch,
            state.step,
            num_steps(len(split), config.batch_size),
        )
    )
    validation = ray.get(spec.validation) if spec.validation else None
    hooks = engine.Hooks(send, functools.partial(_report, spec, group, send, validation))
    try:
        engine.train(state, split, config, group, hooks)
    except engine.TrainingDivergedError as error:
        return str(error)  # not raised: Ray would take it for a lost worker and try again
    return None


def _ignore(event: Event) -> None:
    """Take the place of sending on every rank but 0."""


def _hosts(group: engine.Group) -> tuple[str, ...]:
    """Return the node of each rank, in their order."""
    hosts: list[str] = [""] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(hosts, socket.gethostname())
        return tuple(hosts)
    return (socket.gethostname(),)


def _report(
    spec: LoopSpec,
    group: engine.Group,
    send: Callable[[Event], Any],
    validation: Split | None,
    state: engine.TrainingState,
    progress: Progress,
) -> None:
    """Hand a checkpoint to Ray Train, on all ranks at once; rank 0 writes it. An epoch's last is validated."""
    epoch_finished = state.step == 0
    if epoch_finished:
        send(EpochFinished(progress))
    metrics = report_metrics(state, progress, validation if group.rank == 0 else None)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if group.rank == 0:
            checkpoints.save_checkpoint(Path(folder), state, spec.about | {"versions": versions()})
            checkpoint = Checkpoint.from_directory(folder)
            checkpoint.set_metadata({"epoch": state.epoch})
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_dir_name=checkpoint_name(state),
            # Only the rank that brings the checkpoint may ask for its validation.
            validation=group.rank == 0 and epoch_finished and spec.validates_in_tasks,
        )


def report_metrics(
    state: engine.TrainingState, progress: Progress, validation: Split | None = None
) -> dict[str, float]:
    """Return what is reported with a checkpoint; with held-out images given, they are evaluated here and now."""
    metrics: dict[str, float] = {
        "epoch": state.epoch,
        "step": state.step,
        "epochs": state.epoch + state.step / progress.num_steps,
        "train_loss": progress.sums.loss,
        "train_accuracy": progress.sums.accuracy,
        "images_per_s": progress.images_per_s,
        "train_s": state.finished_s + state.epoch_s,
    }
    if validation is not None:
        result = engine.evaluate(state.model, validation)
        metrics |= {"val_loss": result.loss, "val_accuracy": result.accuracy}
    return metrics


def checkpoint_name(state: engine.TrainingState) -> str:
    """Return the name of a checkpoint's folder; names sort as the training goes."""
    return f"checkpoint_epoch-{state.epoch:03d}_step-{state.step:06d}"
