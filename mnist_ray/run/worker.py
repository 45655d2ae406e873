"""A worker of a run: its set-up, and what it does while the ``Trainer`` trains."""

from __future__ import annotations

import copy
import math
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mnist_ray.checkpoints import checkpoint as checkpoints
from mnist_ray.checkpoints.find import drop_worse, load_fitting, read_weights
from mnist_ray.checkpoints.state_file import CheckpointMetrics
from mnist_ray.cluster.devices import name_of
from mnist_ray.cluster.plan import threads_per_worker
from mnist_ray.cluster.remote_data import RemoteSplit
from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Split
from mnist_ray.job.job import Job
from mnist_ray.parallel.group import Group, resolve_precision
from mnist_ray.parallel.reproducible import check_arithmetic
from mnist_ray.parallel.sharding import is_wanted
from mnist_ray.process import Watchdog, in_thread, keep_freed_memory, usable_cores
from mnist_ray.provenance import versions
from mnist_ray.schema import INITIAL_FILE
from mnist_ray.storage import checkpoint_name, in_one_line
from mnist_ray.training.callback import Callback
from mnist_ray.training.evaluation import evaluate_together
from mnist_ray.training.events import EpochFinished, Event, Note, Progress, Saved, Started, Validated
from mnist_ray.training.metrics import score
from mnist_ray.training.state import StopWantedError, TrainingState, is_over, is_validation_due
from mnist_ray.training.stopwatch import CHECKPOINTS, STORAGE, VALIDATION
from mnist_ray.training.timing import is_bf16_slow
from mnist_ray.training.trainer import Trainer, create_state
from mnist_ray.workload import user_code
from mnist_ray.workload.figures import RATE

STORAGE_LIMIT_S = 3600.0  # for a checkpoint, in addition to hang_timeout_s


@dataclass(frozen=True, kw_only=True)
class LoopSpec:
    """The job and its data, as every worker gets them."""

    job: Job
    train: RemoteSplit | Split
    validation: Sequence[RemoteSplit | Split] = ()  # sets, of which the first chooses the checkpoint
    until_epoch: float = math.inf  # the end of a sweep's segment; raises StopWantedError if epochs are left
    event_queue: Any = None  # the actor that rank 0 reports to; None without Ray
    is_local: bool = False  # on a local Ray; its node cannot be preempted


class Sink:
    """Where a worker's events go."""

    def send(self, event: Event) -> None:
        """Send an event."""
        raise NotImplementedError

    def stop_requested(self) -> bool:
        """Return whether the training must stop; rank 0 is asked."""
        return False


def train_worker(
    spec: LoopSpec, group: Group, sink: Sink, cpus: float, workers_on_node: int = 1, policies: Sequence[Callback] = ()
) -> None:
    """Set up a worker with ``cpus``; train from the newest checkpoint, with ``policies`` beside the user's callbacks.

    Raises like ``Trainer.train`` and ``restore_newest``.
    """
    job = spec.job

    def load_initial(model: nn.Module) -> None:  # the weights of --init-from
        if job.initial is not None:
            load_fitting(model, read_weights(job.initial.inside(INITIAL_FILE)))

    torch.backends.cudnn.allow_tf32 = False  # --precision fp32 means fp32
    num_threads = threads_per_worker(cpus, usable_cores(), workers_on_node, job.train.batch_size // group.world_size)
    torch.set_num_threads(1 if job.train.reproducible else num_threads)
    with Watchdog(0.0 if job.workers.num_workers == 0 else job.workers.hang_timeout_s) as watchdog:  # 0: for debuggers
        config = replace(job.train, precision=resolve_precision(job.train.precision, group))
        split = spec.train.open() if isinstance(spec.train, RemoteSplit) else spec.train
        watchdog.heartbeat()
        state = create_state(job.workload, config, len(split), group, load_initial)
        watchdog.heartbeat()
        callbacks: list[Any] = copy.deepcopy([*job.workload.callbacks])  # checkpoints match them by position
        callbacks += [user_code.create(code, Callback) for code in job.callbacks]
        metrics, skipped = checkpoints.restore_newest(job.run, state, callbacks, group)
        config = _settle(job, state, split, config, group)
        worker = Worker(spec, state, config, group, callbacks, sink, watchdog)
        trainer = Trainer(
            job.workload,
            state,
            split,
            config,
            group,
            [*callbacks, *policies, worker],
            num_loader_processes=job.workers.loader_workers,
            read_ahead_mib=job.workers.read_ahead_mib,
        )
        worker.start(metrics, skipped)
        try:
            trainer.train()
        except Exception:  # an error of the code, or a StopWantedError
            worker.wait()
            raise
        worker.end()


def _settle(job: Job, state: TrainingState, split: Split, config: TrainConfig, group: Group) -> TrainConfig:
    """Choose precision and how memory is freed; return the config with its precision.

    A resumed run keeps the precision in ``state``. With ``--reproducible``, raises if processors differ.
    """
    if config.reproducible:
        check_arithmetic(group)
    if job.train.precision == "auto" and config.precision == "bf16":
        if state.total_step == 0:
            state.bf16_is_slow = is_bf16_slow(job.workload, state, split, config, group)
        config = replace(config, precision="fp32" if state.bf16_is_slow else "bf16")
    # Not earlier: the memory of a whole model, or of a checkpoint that was read, should go back to the kernel.
    keep_freed_memory(is_sharded=state.is_sharded)
    return config


@dataclass(eq=False)
class Worker(Callback):
    """What a worker does beside training: it reports to a sink and, at each checkpoint, validates and saves."""

    spec: LoopSpec
    state: TrainingState
    config: TrainConfig
    group: Group
    callbacks: Sequence[Callback]  # the user's
    sink: Sink
    watchdog: Watchdog

    def __post_init__(self) -> None:
        self._checkpointer = Checkpointer(self.spec.job, self.config, self.group, self.callbacks)
        opened = [split.open() if isinstance(split, RemoteSplit) else split for split in self.spec.validation]
        # by how the names of their figures begin
        self._validation = {f"val_{split.name}_" if number else "val_": split for number, split in enumerate(opened)}

    def start(self, metrics: CheckpointMetrics, skipped: Sequence[str]) -> None:
        """Report the start of training, and once more what the checkpoint has: a kill may have lost its events.

        ``metrics``: the checkpoint's. ``skipped``: the names of newer checkpoints, which are damaged. If a kill came
        before a sweep has recorded a segment, its end is the checkpoint: raise StopWantedError.
        """
        self.watchdog.heartbeat()
        state = self.state
        last_step = math.ceil(min(self.spec.until_epoch, self.config.num_epochs) * state.steps_per_epoch)
        state.last_step = min(last_step, state.total_steps)
        started = Started(
            num_workers=self.group.world_size,
            hosts=tuple(self.group.gathered(socket.gethostname())),
            threads=torch.get_num_threads(),
            device=self.group.device.type,
            precision=self.config.precision,
            epoch=state.epoch,
            step=state.step,
            total_step=state.total_step,
            epochs=state.epochs,
            damaged=tuple(skipped),
            processor=name_of(self.group.device),
        )
        self.sink.send(started)
        if metrics.is_candidate:
            self._send_validation(state, metrics)
        if metrics.is_validated:
            self.sink.send(Saved(math.ceil(metrics.epochs), metrics.to_dict()))
        if state.total_step >= state.last_step and not is_over(state, self.config):
            raise StopWantedError

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raises JobError if it could not be."""
        self.watchdog.heartbeat(STORAGE_LIMIT_S)
        self._checkpointer.wait(self.state)

    def end(self) -> None:
        """Wait like ``wait``; report if training stopped early."""
        self.wait()
        state = self.state
        if state.epoch < self.config.num_epochs:
            best = max(zip(state.scores, state.validated_at, strict=True), key=lambda pair: pair[0], default=None)
            when = f": validation was best after epoch {best[1]:.4g}" if best else ""
            self.sink.send(Note(f"training stopped after epoch {state.epochs:.4g}{when}"))

    def on_step(self, state: TrainingState) -> None:
        """Show that this worker does not hang."""
        self.watchdog.heartbeat()

    def on_progress(self, state: TrainingState, progress: Progress) -> None:
        """Report the progress."""
        self.sink.send(progress)

    def wants_stop(self) -> bool:
        """Return whether the user or the driver wants the training to stop."""
        return self.sink.stop_requested()

    def on_checkpoint(self, state: TrainingState, progress: Progress) -> None:
        """Validate, if it is due. Save, and report both."""
        state.watch.turn(CHECKPOINTS)
        if state.step == 0:
            self.sink.send(EpochFinished(progress))
        metrics = self._metrics(state, progress)
        if metrics.is_candidate:
            self._after_validation(state, metrics)
        metrics = replace(metrics, is_over=is_over(state, self.config))
        self.watchdog.heartbeat(STORAGE_LIMIT_S)
        self._checkpointer.save(state, metrics)
        if metrics.is_validated and math.isfinite(self.spec.until_epoch):  # a sweep does not train it again
            self._checkpointer.wait(state)
        self.watchdog.heartbeat()
        if metrics.is_validated or state.step == 0:
            state.watch.turn(CHECKPOINTS)
            if state.watch.is_on_gpu:
                torch.cuda.synchronize()
            seconds = self.group.gathered(state.watch.taken())  # of each rank, by part
            self.sink.send(Saved(math.ceil(metrics.epochs), metrics.to_dict(), seconds))

    def _metrics(self, state: TrainingState, progress: Progress) -> CheckpointMetrics:
        """Return a checkpoint's metrics; if a validation is due, or a sweep's segment ends, all ranks validate."""
        is_candidate = is_validation_due(state, self.config)
        values: dict[str, Any] = {f"train_{name}": value for name, value in progress.so_far.items()}
        values |= progress.logged
        values |= {RATE: progress.examples_per_s, "train_s": state.finished_s + state.epoch_s}
        if self._validation and (is_candidate or state.epochs >= self.spec.until_epoch):
            values |= self._validated(state, is_candidate)
        return CheckpointMetrics(epoch=state.epoch, step=state.step, epochs=state.epochs, values=values)

    def _validated(self, state: TrainingState, is_candidate: bool) -> dict[str, Any]:
        """Evaluate the model on the validation sets, each rank its part of them; return values for the metrics.

        A checkpoint that is no candidate is saved only at the end of a sweep's segment. Outside of the sweep, the same
        run would not have it, so it must not be the best one.
        """
        workload, start = self.spec.job.workload, time.perf_counter()
        values = dict[str, Any]()
        for prefix, split in self._validation.items():
            with state.watch.on(VALIDATION):
                evaluation = evaluate_together(
                    workload,
                    state.result,
                    split,
                    self.config,
                    self.group,
                    num_loader_processes=self.spec.job.workers.loader_workers,
                    on_batch=self.watchdog.heartbeat,
                )
            for note in evaluation.notes(split, workload.nouns):
                self.sink.send(Note(f"{split.name}: {note}" if split.name else note))
            metrics = evaluation.values(workload)
            if is_candidate and not values:
                values["val_score"] = [*score(workload, metrics)]
            values |= {f"{prefix}{name}": value for name, value in metrics.items()}
        return {**values, "val_s": time.perf_counter() - start}

    def _after_validation(self, state: TrainingState, metrics: CheckpointMetrics) -> None:
        """Let a schedule that looks at a metric, and the user's callbacks, see a validation; report it."""
        state.scores.append(metrics.score)
        state.validated_at.append(state.epochs)
        values = self._figures(metrics)
        for scheduler in state.schedulers.values():
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(values[self.spec.job.workload.monitor.name])
        for callback in self.callbacks:
            callback.on_validation(state, values)
        self._send_validation(state, metrics)

    def _send_validation(self, state: TrainingState, metrics: CheckpointMetrics) -> None:
        """Report a checkpoint's validation."""
        seconds = metrics.values.get("val_s", math.nan)
        others = {split.name: self._figures(metrics, prefix) for prefix, split in [*self._validation.items()][1:]}
        self.sink.send(Validated(metrics.epochs, self._figures(metrics), seconds, state.total_step, others))

    def _figures(self, metrics: CheckpointMetrics, prefix: str = "val_") -> dict[str, float]:
        """Return loss and metrics on a validation set; NaN for a metric added to the workload since."""
        names = [metric.name for metric in self.spec.job.workload.all_metrics]
        return {name: metrics.values.get(f"{prefix}{name}", math.nan) for name in names}


class Checkpointer:
    """Copies the state; a thread writes the copy into the run's folder, and then deletes checkpoints.

    The last one and the best ``keep_checkpoints`` by validation are kept; for None, all.
    """

    def __init__(self, job: Job, config: TrainConfig, group: Group, callbacks: Sequence[Callback]) -> None:
        self._job, self._config, self._group, self._callbacks = job, config, group, callbacks
        self._writing: Future[None] | None = None  # of the last checkpoint
        # The threads that write a sharded checkpoint need their own group: training continues on the other one.
        self._writers = dist.new_group(backend="gloo") if is_wanted(config, group.world_size) else None

    def save(self, state: TrainingState, metrics: CheckpointMetrics) -> None:
        """Wait for the previous checkpoint; save another: rank 0 or, if the state is sharded, each rank its part.

        All ranks must call this. Raises JobError if the previous one could not be written.
        """
        if self._group.rank > 0 and not state.is_sharded:
            for callback in self._callbacks:  # on every rank alike: it may communicate
                callback.state_dict()
            return
        self.wait(state)
        about = {"config": asdict(self._job.train), "workload": self._job.workload.identity}
        about |= {"metrics": metrics.to_dict(), "versions": versions()}
        copied = checkpoints.snapshot(state, about, self._callbacks, self._group)
        folder = self._job.run.inside(checkpoint_name(state.epoch, state.step))

        def write() -> None:
            with in_one_line("the storage has failed"):
                copied.write(folder, self._writers)
                if self._group.rank == 0 and self._config.keep_checkpoints is not None:
                    drop_worse(self._job.run, self._config.keep_checkpoints)

        self._writing = in_thread(write)

    def wait(self, state: TrainingState) -> None:
        """Wait until the last checkpoint is written. Raises JobError if it could not be."""
        if self._writing is not None:
            with state.watch.on(STORAGE):
                self._writing.result()
