"""The set-up of a worker of a run or a trial, and its reports to Ray Train, Ray Tune or this process."""

from __future__ import annotations

import copy
import functools
import math
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mnist_ray.checkpoints import checkpoint as checkpoints
from mnist_ray.checkpoints.saved_model import load_fitting, read_weights
from mnist_ray.checkpoints.summary import CheckpointMetrics
from mnist_ray.cluster.devices import name_of
from mnist_ray.cluster.plan import threads_per_worker
from mnist_ray.cluster.remote_data import RemoteSplit
from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Split
from mnist_ray.errors import TrainingStoppedError, first_line
from mnist_ray.job.job import Job
from mnist_ray.parallel.group import Group, resolve_precision
from mnist_ray.parallel.reproducible import check_arithmetic
from mnist_ray.parallel.sharding import is_wanted
from mnist_ray.process import in_thread, keep_freed_memory, usable_cores
from mnist_ray.provenance import arithmetic, versions
from mnist_ray.run.life import STORAGE_LIMIT_S, Life
from mnist_ray.storage import INITIAL_FILE, checkpoint_name, in_one_line, position_of
from mnist_ray.training.callback import Callback
from mnist_ray.training.evaluation import batch_size_of, evaluate_together
from mnist_ray.training.events import EpochFinished, Event, Note, Progress, Saved, Started, StoppedEarly, Validated
from mnist_ray.training.metrics import score
from mnist_ray.training.state import StopWantedError, TrainingState, best_epoch, is_over
from mnist_ray.training.stopwatch import CHECKPOINTS, STORAGE, VALIDATION
from mnist_ray.training.timing import is_bf16_slow, is_one_thread_faster
from mnist_ray.training.trainer import Trainer, create_state
from mnist_ray.workload import user_code
from mnist_ray.workload.figures import RATE


@dataclass(frozen=True, kw_only=True)
class LoopSpec:
    """The job and its data, as every worker gets them."""

    job: Job
    train: RemoteSplit | Split
    validation: RemoteSplit | Split | None = None
    until_epoch: float = math.inf  # the end of a trial's segment; raises StopWantedError if epochs are left
    event_queue: Any = None  # the actor that rank 0 reports to; None if nobody listens
    is_local: bool = False  # on a local Ray; its node cannot be preempted


def train_worker(
    spec: LoopSpec,
    group: Group,
    create_reporter: Callable[[LoopSpec, Group, TrainConfig], Reporter],
    cpus: float,
    workers_on_node: int = 1,
) -> None:
    """Set up a worker with ``cpus``; train from the newest checkpoint. Raises like ``train`` and ``restore_newest``."""
    job = spec.job
    torch.backends.cudnn.allow_tf32 = False  # --precision fp32 means fp32
    planned = threads_per_worker(cpus, usable_cores(), workers_on_node, job.train.batch_size // group.world_size)
    torch.set_num_threads(1 if job.train.reproducible else planned)
    life = Life(job, group.rank, spec.event_queue)
    try:
        _train(spec, group, create_reporter, life)
    finally:
        life.end()


def _train(
    spec: LoopSpec, group: Group, create_reporter: Callable[[LoopSpec, Group, TrainConfig], Reporter], life: Life
) -> None:
    job = spec.job
    config = replace(job.train, precision=resolve_precision(job.train.precision, group))
    if config.reproducible:
        check_arithmetic(group.world_size)
    split = _opened(spec.train)
    life.show()
    state = create_state(job.workload, config, len(split), group, functools.partial(_load_initial, job))
    plateaus = [each for each in state.schedulers.values() if isinstance(each, ReduceLROnPlateau)]
    if spec.validation is None and plateaus:
        remedy = "leave --validation-size 0 and --overfit-batches out"
        raise TrainingStoppedError(f"ReduceLROnPlateau looks at the validation, but there is none; {remedy}")
    life.show()
    reporter = create_reporter(spec, group, config)
    restored = checkpoints.restore_newest(job.run, state, reporter.callbacks, group)
    if job.train.precision == "auto" and config.precision == "bf16":
        if not restored.name:  # a resumed run keeps the choice, and so its bits
            state.bf16_is_slow = is_bf16_slow(job.workload, state, split, config, group)
        config = replace(config, precision="fp32" if state.bf16_is_slow else "bf16")
    if job.workers.cpus_per_worker is None and not state.is_sharded:
        _choose_threads(job, state, split, config, group, is_new=not restored.name)
    # Not earlier: the memory of a whole model, or of a checkpoint that was read, should go back to the kernel.
    keep_freed_memory(is_sharded=state.is_sharded)
    state.last_step = min(
        math.ceil(min(spec.until_epoch, config.num_epochs) * state.steps_per_epoch), state.total_steps
    )
    callbacks = [*reporter.callbacks, reporter]
    try:
        reporter.start(state, restored, life)
        Trainer(
            job.workload,
            state,
            split,
            config,
            group,
            callbacks,
            num_loader_processes=job.workers.loader_workers,
            read_ahead_mib=job.workers.read_ahead_mib,
        ).train()
    except torch.OutOfMemoryError as error:
        if restored.name and position_of(restored.name) == (state.epoch, state.step):
            raise  # a dead worker's memory may not be free yet: Ray tries again
        half = max(1, (config.micro_batch_size or math.ceil(config.batch_size / group.world_size)) // 2)
        remedy = f"try --micro-batch-size {half}, lower --batch-size, or override the workload's evaluation_batch_size"
        raise TrainingStoppedError(f"{first_line(error)}; {remedy}") from error
    except Exception as error:  # an error of the code, or a StopWantedError
        reporter.finish_saving(state)
        if type(error).__name__ != "FailOnRecompileLimitHit":  # dynamo's; its import takes a second
            raise
        remedy = "pad them to a few in collate"
        raise TrainingStoppedError(f"--compile: the inputs have too many shapes; {remedy}") from error
    reporter.end(state)


def _choose_threads(
    job: Job, state: TrainingState, split: Split, config: TrainConfig, group: Group, *, is_new: bool
) -> None:
    """Use one thread if steps are small. A resumed run keeps the choice in ``state``, and so its bits."""
    if is_new:
        state.one_thread = is_one_thread_faster(job.workload, state, split, config, group)
    if state.one_thread:
        torch.set_num_threads(1)


def _load_initial(job: Job, model: nn.Module) -> None:
    """Load the weights of ``--init-from``, if there are any, into a new model."""
    if job.initial is not None:
        load_fitting(model, read_weights(job.initial.inside(INITIAL_FILE)))


def _opened(split: RemoteSplit | Split) -> Split:
    return split.open() if isinstance(split, RemoteSplit) else split


class Reporter(Callback):
    """Validates, saves checkpoints and reports events for a worker; subclasses decide where events go."""

    waits_for_storage = True  # until a checkpoint is written that ends an epoch or a trial's segment

    def __init__(self, spec: LoopSpec, group: Group, config: TrainConfig) -> None:
        self._spec, self._group, self._config = spec, group, config
        self._job = job = spec.job
        self._is_first = group.rank == 0
        self._validation = None if spec.validation is None else _opened(spec.validation)
        self._batch_size: int | None = None  # of a validation; the first validation finds it
        self._saving: Future[None] | None = None  # of the last checkpoint, in its own thread
        self._saving_s = 0.0  # that the last checkpoint took until it was written
        # The threads that write a sharded checkpoint need their own group: training continues on the other one.
        self._writers = torch.distributed.new_group(backend="gloo") if is_wanted(config, group.world_size) else None
        self._not_finite = 0, 0  # of the last validation
        self._has_begun_again = False  # a stream of training data
        # Checkpoints match callbacks by position. Each worker and each run in a process has its own.
        of_flags = [user_code.create(code, Callback) for code in job.callbacks]
        own: list[Any] = copy.deepcopy([*job.workload.callbacks])
        self.callbacks: list[Callback] = [*own, *of_flags]

    def start(self, state: TrainingState, restored: checkpoints.Restored, life: Life) -> None:
        """Report the start of training, from the ``restored`` checkpoint if there is one; from now on, show ``life``.

        If a trial was killed before the sweep recorded it, the checkpoint may be at the end of the trial's segment or
        past it. Then report the checkpoint, and raise StopWantedError.
        """
        self._life, life.state = life, state
        life.show()
        hosts = [socket.gethostname()] * self._group.world_size
        if self._group.world_size > 1:
            torch.distributed.all_gather_object(hosts, hosts[0])
        is_segment_over = state.total_step >= state.last_step and not is_over(state, self._config)
        if is_segment_over and not restored.metrics.is_validated:  # past the end: sweep.csv was lost
            metrics = replace(restored.metrics, values={**restored.metrics.values, **self._validated(state)})
            restored = replace(restored, metrics=metrics)
        self.on_restored(state, restored, hosts)
        if is_segment_over:
            raise StopWantedError

    def on_restored(self, state: TrainingState, restored: checkpoints.Restored, hosts: Sequence[str]) -> None:
        """Report that all ranks, on these ``hosts``, have restored the same checkpoint or begin without one."""
        self.send(self._started(state, restored, hosts))

    def end(self, state: TrainingState) -> None:
        """Wait for the last checkpoint, and report the end of training if training stopped early."""
        self.finish_saving(state)
        if state.epoch < self._config.num_epochs:
            self.send(StoppedEarly(state.epoch, best_epoch(state.scores) if state.scores else None))

    def send(self, event: Event) -> None:
        """Report an event. This method does nothing unless a subclass overrides it."""

    def on_step(self, state: TrainingState) -> None:
        """Show that this worker does not hang. Tell if a stream of training data begins again."""
        self._life.show()
        if state.read_to is not None and state.read_to["rounds"] > 0 and not self._has_begun_again:
            self._has_begun_again = True
            self.send(Note(f"the stream of training data ended in step {state.total_step}; it begins again each time"))

    def _started(self, state: TrainingState, restored: checkpoints.Restored, hosts: Sequence[str]) -> Started:
        has_changed = restored.arithmetic not in (None, arithmetic())
        changed = "versions or processor changed since the checkpoint: results are no longer bit-identical"
        small = "steps are so small that one thread is as fast as several; --cpus-per-worker sets another number"
        slow = "this processor computes the model faster in fp32 than in bf16, so --precision auto is fp32"
        is_small = state.one_thread and torch.get_num_threads() == 1
        notes = {changed: has_changed, small: is_small, slow: state.bf16_is_slow}
        return Started(
            num_workers=self._group.world_size,
            hosts=tuple(hosts),
            threads=torch.get_num_threads(),
            device=self._group.device.type,
            precision="fp32" if state.bf16_is_slow else self._config.precision,
            epoch=state.epoch,
            step=state.step,
            total_step=state.total_step,
            damaged=restored.damaged,
            notes=tuple(note for note, applies in notes.items() if applies),
            processor=name_of(self._group.device),
        )

    def on_checkpoint(self, state: TrainingState, progress: Progress) -> None:
        """Validate if that is due, then save."""
        state.watch.turn(CHECKPOINTS)
        metrics = self.validate_and_report(state, progress)
        self._life.show(STORAGE_LIMIT_S)
        with state.pace.saving():
            self.keep(state, metrics)
        self._life.show()
        if state.step == 0:
            self.send(Saved(state.epoch, self._seconds_of_all(state)))

    def keep(self, state: TrainingState, metrics: CheckpointMetrics) -> None:
        """Save a checkpoint, and report it to the keeper of checkpoints."""
        raise NotImplementedError

    def _seconds_of_all(self, state: TrainingState) -> list[list[float]]:
        """Return the seconds of each rank since the last progress, by part; all ranks must call this."""
        state.watch.turn(CHECKPOINTS)
        if state.watch.is_on_gpu:
            torch.cuda.synchronize()
        seconds = [state.watch.taken()] * self._group.world_size
        if self._group.world_size > 1:
            torch.distributed.all_gather_object(seconds, seconds[0])
        return seconds

    def save(self, state: TrainingState, metrics: CheckpointMetrics, drop: Callable[[], object]) -> None:
        """Let a thread write a checkpoint into the run's folder, and then ``drop`` others.

        If the state is sharded, all ranks must call this. Wait for the previous one, and for this one if the reporter
        waits for the storage. Raises JobError for either.
        """
        start = time.monotonic()
        self.finish_saving(state)
        with state.watch.on(STORAGE):
            state.pace.wait()
        self._life.show()  # a callback's state_dict may hang
        copied, folder = self.snapshot(state, metrics), self._job.run.inside(checkpoint_name(state.epoch, state.step))
        self._life.show(STORAGE_LIMIT_S)

        def write() -> None:
            with in_one_line("the storage has failed"), state.pace.writing():
                copied.write(folder, self._writers)
                drop()
            self._saving_s = time.monotonic() - start

        self._saving = in_thread(write)
        if self.waits_for_storage and (state.step == 0 or metrics.is_validated):
            self.finish_saving(state)

    def finish_saving(self, state: TrainingState) -> None:
        """Wait until the last checkpoint is written. Raises JobError if it could not be."""
        if self._saving is not None:
            with state.watch.on(STORAGE):
                self._saving.result()

    def snapshot(self, state: TrainingState, metrics: CheckpointMetrics) -> checkpoints.Snapshot:
        """Return a copy of the state for a checkpoint."""
        about = {"config": asdict(self._job.train), "workload": self._job.workload.identity}
        about |= {"metrics": metrics.to_dict(), "versions": versions()}
        if self._config.reproducible:
            about["arithmetic"] = arithmetic()
        return checkpoints.snapshot(state, about, self.callbacks, self._group)

    def validate_and_report(self, state: TrainingState, progress: Progress) -> CheckpointMetrics:
        """Return a checkpoint's metrics; where an epoch or a trial's segment ends, all ranks validate.

        At the end of an epoch, report the epoch, and add the validation's score to ``state``.
        """
        is_epoch_end = state.step == 0
        if is_epoch_end:
            self.send(EpochFinished(progress))
        epochs = state.epoch + state.step / state.steps_per_epoch
        is_due = self._validation is not None and (is_epoch_end or epochs >= self._spec.until_epoch)
        values: dict[str, Any] = {f"train_{name}": value for name, value in progress.so_far.items()}
        values |= progress.logged
        values |= {RATE: progress.examples_per_s, "train_s": state.finished_s + state.epoch_s}
        values |= self._validated(state) if is_due else {}
        metrics = CheckpointMetrics(epoch=state.epoch, step=state.step, epochs=epochs, values=values)
        if is_epoch_end and metrics.is_validated:
            state.scores.append(metrics.score)
            self._after_validation(state, metrics)
            self.send_validation(state.epoch, metrics, self._not_finite)
        return replace(metrics, is_over=is_over(state, self._config))

    def _after_validation(self, state: TrainingState, metrics: CheckpointMetrics) -> None:
        """Let a schedule that looks at a metric, and the user's callbacks, see an epoch's validation."""
        workload = self._job.workload
        values = {metric.name: metrics.values[f"val_{metric.name}"] for metric in workload.all_metrics}
        for scheduler in state.schedulers.values():
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(values[workload.monitor.name])
        for callback in self.callbacks:
            callback.on_validation(state, values)

    def _validated(self, state: TrainingState) -> dict[str, Any]:
        """Let all ranks validate; return the validation's values for a checkpoint's metrics."""
        assert self._validation is not None
        workload, start = self._job.workload, time.perf_counter()
        split, loader_workers = self._validation, self._job.workers.loader_workers
        with state.watch.on(VALIDATION):
            if self._batch_size is None:
                self._batch_size = batch_size_of(workload, state.result, split, self._config, loader_workers)
            evaluation = evaluate_together(
                workload,
                state.result,
                split,
                self._config,
                self._group,
                num_loader_processes=loader_workers,
                on_batch=lambda num_done: self._life.show(),
                batch_size=self._batch_size,
            )
        self._not_finite = evaluation.not_finite
        values = evaluation.values(workload)
        of_metrics = {f"val_{name}": value for name, value in values.items()}
        seconds = time.perf_counter() - start
        rate = len(split) / seconds / self._group.world_size  # of one worker
        return {**of_metrics, "val_score": [*score(workload, values)], "val_s": seconds, "val_examples_per_s": rate}

    def send_validation(self, epoch: int, metrics: CheckpointMetrics, not_finite: tuple[int, int] = (0, 0)) -> None:
        """Report the validation of an epoch."""
        known = metrics.values
        names = [metric.name for metric in self._job.workload.all_metrics]
        values = {name: known.get(f"val_{name}", math.nan) for name in names}  # the workload may have new ones
        self.send(Validated(epoch, values, known.get("val_s", math.nan), not_finite))
