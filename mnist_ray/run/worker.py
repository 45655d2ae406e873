"""What each worker does: one set-up for runs and trials, around the loop of plain PyTorch."""

from __future__ import annotations

import faulthandler
import socket
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mnist_ray.cluster.environment import end_if_hung, keep_freed_memory
from mnist_ray.cluster.plan import threads_per_worker, usable_cores
from mnist_ray.cluster.remote_data import RemoteSplit
from mnist_ray.config import TrainConfig
from mnist_ray.provenance import arithmetic, versions
from mnist_ray.run.job import Job, about
from mnist_ray.storage import RunFolder, checkpoint_name
from mnist_ray.training import checkpoint as checkpoints
from mnist_ray.training import engine
from mnist_ray.training.callback import Callback
from mnist_ray.training.debug import Profiler, anomalies_found
from mnist_ray.training.events import EpochFinished, Event, Progress, Started, StoppedEarly, Validated
from mnist_ray.training.metrics import score
from mnist_ray.training.reproducible import check_arithmetic
from mnist_ray.training.state import Group, TrainingState, best_epoch, is_over
from mnist_ray.workload import user_code
from mnist_ray.workload.base import Workload
from mnist_ray.workload.data import Split
from mnist_ray.workload.user_code import Source


@dataclass(frozen=True)
class LocalSplit:
    """A split for a worker in the same process."""

    split: Split

    def open(self) -> Split:
        """Return it."""
        return self.split


@dataclass(frozen=True, kw_only=True)
class LoopSpec:
    """What every worker is handed."""

    workload: Workload
    config: TrainConfig
    train: RemoteSplit | LocalSplit
    run: RunFolder  # where the checkpoints are
    about: dict[str, Any]  # written into every checkpoint
    hang_timeout_s: float  # A worker that takes no step for so long ends itself
    event_queue: Any = None  # the actor that rank 0 tells how it goes; None if nobody listens
    loader_workers: int = 0  # processes that read a `Dataset`
    validates_in_tasks: bool = False  # whether each epoch's checkpoint is validated by a task beside the training
    validation: RemoteSplit | LocalSplit | None = None
    """Examples that the workers evaluate themselves before they report: whether they go on depends on it."""
    callback: Source | None = None  # the user's code in the training loop
    profile: int | None = None  # steps to profile
    detect_anomaly: bool = False

    @classmethod
    def of(
        cls, job: Job, train: RemoteSplit | LocalSplit, validation: RemoteSplit | LocalSplit | None, **more: Any
    ) -> LoopSpec:
        """Return what the workers of a job are handed."""
        return cls(
            workload=job.workload,
            config=job.train,
            train=train,
            run=job.run,
            about=about(job),
            hang_timeout_s=job.workers.hang_timeout_s,
            loader_workers=job.workers.loader_workers,
            validation=validation,
            callback=job.callback,
            profile=job.output.profile,
            detect_anomaly=job.output.detect_anomaly,
            **more,
        )

    @property
    def folders(self) -> list[Path]:
        """Where the user's code is."""
        return user_code.folders_of(self.callback, self.workload.source)


def train_worker(spec: LoopSpec, group: Group, reporter: Reporter, cpus: float, workers_on_node: int = 1) -> None:
    """Set a worker up, and train from its run's newest checkpoint, if there is one, to the end.

    ``cpus`` are those of this worker. Raises what ``engine.train`` and ``restore_newest`` do.
    """
    keep_freed_memory()
    threads = threads_per_worker(cpus, usable_cores(), workers_on_node, spec.config.batch_size // group.world_size)
    torch.set_num_threads(1 if spec.config.reproducible else threads)
    split = spec.train.open()
    state = engine.create_state(spec.workload, spec.config, len(split), group.device)
    restored = checkpoints.restore_newest(spec.run, state, reporter.callbacks)
    config = replace(spec.config, precision=engine.resolve_precision(spec.config.precision, group))
    if config.reproducible:
        check_arithmetic(group.world_size)
    end_if_hung(spec.hang_timeout_s)
    reporter.begin(state, restored, config)
    try:
        with anomalies_found(spec.detect_anomaly, *spec.folders):
            engine.train(
                spec.workload, state, split, config, group, [*reporter.callbacks, reporter], spec.loader_workers
            )
    finally:
        faulthandler.cancel_dump_traceback_later()
    reporter.end(state)


class Reporter(Callback):
    """What a worker does besides training: it watches over itself, validates and saves; subclasses say to whom."""

    def __init__(self, spec: LoopSpec, group: Group) -> None:
        self._spec, self._group = spec, group
        self._is_first = group.rank == 0
        self._validation = spec.validation.open() if spec.validation else None
        self._config = spec.config
        self.callbacks: list[Callback] = [user_code.load(spec.callback, Callback)()] if spec.callback else []
        """The user's, and then our own: a checkpoint knows them by their places."""
        if spec.profile is not None:
            self.callbacks.append(Profiler(spec.profile, spec.run))

    def begin(self, state: TrainingState, restored: checkpoints.Restored, config: TrainConfig) -> None:
        """Training is about to begin with ``config``, from what was ``restored``."""
        self._config = config

    def end(self, state: TrainingState) -> None:
        """Training is over; tell if that is early."""
        if state.epoch < self._config.num_epochs:
            self.send(StoppedEarly(state.epoch, best_epoch(state.scores)))

    def send(self, event: Event) -> None:
        """Tell how the training goes; a reporter that nobody listens to leaves it so."""

    def on_progress(self, state: TrainingState, progress: Progress) -> None:
        """Note that training goes on."""
        end_if_hung(self._spec.hang_timeout_s)

    def started(self, state: TrainingState, restored: checkpoints.Restored) -> Started:
        """Return what the driver is told as training begins."""
        return Started(
            num_workers=self._group.world_size,
            hosts=_hosts(self._group),
            threads=torch.get_num_threads(),
            device=self._group.device.type,
            precision=self._config.precision,
            epoch=state.epoch,
            step=state.step,
            num_steps=int(state.last_step),
            damaged=restored.damaged,
            notes=_notes(restored),
        )

    def save(self, state: TrainingState, metrics: dict[str, Any]) -> str:
        """Write a checkpoint into the run's folder; return its name."""
        name = checkpoint_name(state.epoch, state.step)
        with tempfile.TemporaryDirectory() as local:
            self.snapshot(state, metrics).write(Path(local))
            self._spec.run.inside(name).upload(local)
        return name

    def snapshot(self, state: TrainingState, metrics: dict[str, Any]) -> checkpoints.Snapshot:
        """Return a copy of what a checkpoint holds."""
        about = self._spec.about | {"metrics": metrics, "versions": versions()}
        if self._config.reproducible:
            about["arithmetic"] = arithmetic()
        return checkpoints.snapshot(state, about, self.callbacks)

    def measured(self, state: TrainingState, progress: Progress) -> dict[str, Any]:
        """Return what is reported with a checkpoint; validate first, on all ranks at once, if the workers do that.

        At an epoch's end, ``state`` notes its score, and how it went is told.
        """
        spec, workload, has_finished = self._spec, self._spec.workload, state.step == 0
        if has_finished:
            self.send(EpochFinished(progress))
        metrics = report_metrics(workload, state, progress)
        if self._validation is None:
            return metrics
        start = time.perf_counter()
        evaluation = engine.evaluate_together(
            workload, state.result, self._validation, self._group, spec.loader_workers
        )
        values = evaluation.values(workload)
        if has_finished:
            state.scores.append(score(workload, values))
            self.send(Validated(state.epoch, values, time.perf_counter() - start, is_beside=False))
        return metrics | validation_metrics(workload, values) | {"is_over": is_over(state, self._config)}


def _hosts(group: Group) -> tuple[str, ...]:
    """Return the node of each rank, in their order."""
    hosts: list[str] = [socket.gethostname()] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(hosts, socket.gethostname())
    return tuple(hosts)


def _notes(restored: checkpoints.Restored) -> tuple[str, ...]:
    """Return what the user is to know of the checkpoint that the run goes on from."""
    if restored.arithmetic in (None, arithmetic()):
        return ()
    return ("other versions or another processor than before: from here on the bits are others",)


def report_metrics(workload: Workload, state: TrainingState, progress: Progress) -> dict[str, Any]:
    """Return what is reported with a checkpoint."""
    return {
        "epoch": state.epoch,
        "step": state.step,
        "epochs": state.epoch + state.step / progress.num_steps,
        **{f"train_{name}": value for name, value in progress.so_far.items()},
        workload.rate: progress.examples_per_s,
        "train_s": state.finished_s + state.epoch_s,
    }


def validation_metrics(workload: Workload, values: dict[str, float]) -> dict[str, float]:
    """Return what is reported of a validation: its values, and the score by which Ray keeps the best checkpoints."""
    return {f"val_{name}": value for name, value in values.items()} | {"val_score": score(workload, values)}
