"""The training run on Ray: the loop that each worker runs, and ``fit`` around ``TorchTrainer``."""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import socket
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayActorError, RayError
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
    ValidationConfig,
)
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2._internal.exceptions import RayTrainError, WorkerHealthCheckFailedError
from ray.util.queue import Queue

from mnist_ray.cluster.connection import WorkerPlan, threads_per_worker, usable_cores
from mnist_ray.cluster.rendezvous import WorkerGroupConfig
from mnist_ray.config import TrainConfig
from mnist_ray.environment import end_if_hung, keep_freed_memory
from mnist_ray.errors import JobError, first_line
from mnist_ray.provenance import versions
from mnist_ray.runs import evaluation
from mnist_ray.storage import STORAGE_ERRORS, RunFolder, patiently
from mnist_ray.training import checkpoint as checkpoints
from mnist_ray.training import engine
from mnist_ray.training.events import EpochFinished, Event, NodeLeaving, Started, WorkersLost
from mnist_ray.training.metrics import Progress
from mnist_ray.training.sharding import num_steps
from mnist_ray.workload.mnist.idx import Split

_SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
_POLL_INTERVAL_S = 0.5  # at which the driver asks for events, as often as workers send their progress
# What may go well at the next attempt; other errors of the training's own code are bugs.
_PASSING = (
    *STORAGE_ERRORS,
    JobError,
    MemoryError,
    RayError,
    RayTrainError,
    torch.AcceleratorError,
    torch.distributed.DistError,
)
_RESIZE_INTERVAL_S = 15.0  # how often an elastic run looks whether the cluster holds more workers


@dataclass(frozen=True)
class LoopSpec:
    """What every worker is handed."""

    config: TrainConfig
    split: ray.ObjectRef
    """The training images, in the object store: workers on one node share one copy."""
    run: RunFolder
    """Where the checkpoints are."""
    events: Queue | None
    """Where rank 0 tells how it goes; None where nobody listens."""
    about: dict[str, Any]
    """Written into every checkpoint."""
    hang_timeout_s: float
    """A worker that takes no step for so long ends itself."""
    validation: ray.ObjectRef | None = None
    """Held-out images that rank 0 evaluates itself before it reports, as a trial of a sweep needs it."""

    @property
    def validates_in_tasks(self) -> bool:
        """Whether each epoch's checkpoint is validated by a task beside the training."""
        return self.config.validation_size > 0 and self.validation is None


class TrainingStoppedError(JobError):
    """Training cannot go on with these settings: doing it again would end the same way."""


class CodeFailedError(Exception):
    """The code of the training has failed on a worker, a model's for instance, and would again."""


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
    validation: ray.ObjectRef | None,
    max_failures: int,
    on_event: Callable[[Event], None],
) -> FitResult:
    """Train on Ray, telling ``on_event`` how it goes; a run that ``spec.run`` holds already goes on where it stood.

    Raises TrainingStoppedError where it would end the same way again, JobError where training failed otherwise.
    """
    assert spec.events is not None
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(spec.hang_timeout_s))
    if plan.min_workers is not None:  # so long Ray waits in vain for as many as before, when a node has gone
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    # Without CPUs of its own, validation starts also while the workers hold all of them.
    validate = functools.partial(evaluation.validate, split=validation, events=spec.events)
    options = {"num_cpus": 0, **evaluation.process_options()}
    validation_config = ValidationConfig(validate, ray_remote_kwargs=options) if validation else None
    evaluation.start_process()

    reporter = _FailureReporter(spec.events)

    def attempt() -> ray.train.Result:
        drop_damaged_snapshot(spec.run)
        return create_trainer(spec, plan, max_failures, validation_config=validation_config, callbacks=[reporter]).fit()

    failures_left = max_failures
    while isinstance(result := _wait(attempt, spec.events, on_event), BaseException):
        if isinstance(stopped := getattr(result, "controller_failure", None), TrainingStoppedError):
            raise stopped
        if not isinstance(result, (ray.train.TrainingFailedError, RayError, *STORAGE_ERRORS)):
            raise result
        if failures_left == 0 or not _is_of_storage(result):
            raise JobError(_reason(result) + _saved(spec.run)) from result
        on_event(WorkersLost(_reason(result)))
        spec.run.check_writable(is_patient=True)
        failures_left -= 1
    if result.return_value is not None:
        raise TrainingStoppedError(result.return_value)
    return FitResult(*evaluation.choose(result))


def create_trainer(
    spec: LoopSpec,
    plan: WorkerPlan,
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
        torch_config=WorkerGroupConfig(is_local=plan.is_local),
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers if plan.min_workers is None else (plan.min_workers, plan.num_workers),
            elastic_resize_monitor_interval_s=_RESIZE_INTERVAL_S,
            placement_strategy=plan.placement,
            use_gpu=plan.use_gpu,
            resources_per_worker={"CPU": plan.cpus_per_worker, **({"GPU": 1} if plan.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=spec.run.name,
            storage_path=spec.run.storage_path,
            checkpoint_config=CheckpointConfig(
                num_to_keep=2,  # the best two, and Ray keeps the last besides: were that damaged, there is another
                checkpoint_score_attribute="val_accuracy" if is_validated else None,
            ),
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=list(callbacks),
        ),
        validation_config=validation_config,
    )


def _wait(
    work: Callable[[], ray.train.Result], events: Queue, on_event: Callable[[Event], None]
) -> ray.train.Result | BaseException:
    """Run ``work`` in a thread, so that this one hands on events and takes Ctrl-C; return its result, or its error."""
    outcome: list[ray.train.Result | BaseException] = []

    def target() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    is_running = True
    while is_running:
        thread.join(timeout=_POLL_INTERVAL_S)
        is_running = thread.is_alive()  # seen before the events are: the last ones are handed on too
        # Not get() with a timeout: it says by an exception that nothing came, and Ray logs one that Ctrl-C left.
        if num_events := events.qsize():
            for event in events.get_nowait_batch(num_events):
                on_event(event)
    return outcome[0]


def drop_damaged_snapshot(run: RunFolder) -> None:
    """Remove Ray's list of a run's checkpoints where a kill has cut it off; workers look for checkpoints themselves."""

    def drop() -> None:
        text = run.read_text(_SNAPSHOT_FILE)
        if text is None:
            return
        try:
            names = [result["checkpoint_dir_name"] for result in json.loads(text)["checkpoint_results"]]
        except (ValueError, KeyError, TypeError):
            names = ["(unreadable)"]
        if not all(map(run.exists, names)):
            run.delete_file(_SNAPSHOT_FILE)

    patiently(drop)


def _saved(run: RunFolder) -> str:
    try:
        names = checkpoints.checkpoint_names(run)
    except STORAGE_ERRORS:
        return ""
    return f"; last saved: {names[-1]}" if names else "; nothing was saved"


def _is_of_storage(error: Exception) -> bool:
    """Tell whether Ray's own bookkeeping on storage has failed, which it does not retry."""
    return isinstance(getattr(error, "controller_failure", error), STORAGE_ERRORS)


class _FailureReporter(UserCallback):
    """Tells the driver why workers are being replaced; where that cannot help, ends the run."""

    def __init__(self, events: Queue) -> None:
        self._events = events

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, CodeFailedError):
                # Raised here, Ray takes it for a failure of its own controller, after which it does not try again.
                raise TrainingStoppedError(str(error))
        self._events.actor.put_nowait.remote(WorkersLost(describe(worker_exceptions)))


def describe(worker_exceptions: Mapping[int, Exception]) -> str:
    """Say in one line what happened to workers, by rank: a death, which makes the others fail too, before the rest."""
    rank, error = min(worker_exceptions.items(), key=lambda item: (not isinstance(item[1], RayActorError), item[0]))
    cause = getattr(error, "_base_exc", error)
    text = str(cause).strip().splitlines() or ["no message"]
    if "gloo" in text[0].lower() or isinstance(cause, torch.distributed.DistError):
        return f"worker {rank} has lost its connection to another, which has died or hangs"
    if isinstance(error, WorkerHealthCheckFailedError):
        return f"worker {rank} does not answer"
    if not isinstance(error, RayActorError):
        return f"worker {rank} failed: {type(cause).__name__}: {text[0]}"
    if error.preempted:
        return f"worker {rank} was lost with its node, which was preempted"
    if any("node" in line and ("died" in line or "dead" in line) for line in text):
        return f"worker {rank} was lost with its node"
    return f"worker {rank} died"


def _reason(error: Exception) -> str:
    """Say in one line why training failed: a worker's own exception where there is one."""
    if failures := getattr(error, "worker_failures", None):
        return describe(failures)
    cause = getattr(error, "controller_failure", error)
    cause = getattr(cause, "cause", cause)  # of a RayTaskError, whose own text is a traceback
    text = str(cause).strip().splitlines() or ["no message"]
    return f"Ray Train failed: {type(cause).__name__}: {text[0]}"


def train_loop_per_worker(loop_config: dict[str, LoopSpec]) -> str | None:
    """Train on one worker; every rank runs this. Return why training stopped early, or None where it is done.

    Raises CodeFailedError where the code failed, and what else failed as it is.
    """
    try:
        _train(loop_config["spec"])
    except (checkpoints.OtherModelError, engine.TrainingDivergedError) as error:
        return str(error)  # not raised: Ray would take it for a lost worker and try again
    except _PASSING:
        raise
    except Exception as error:
        if "gloo" in str(error).lower():  # a RuntimeError: another worker has gone
            raise
        raise CodeFailedError(_with_place(error)) from error
    return None


def _with_place(error: Exception) -> str:
    """Return an error in one line, with the last place in this package that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    *_, place = (frame for frame in frames if Path(frame.filename).parent.parent.name == "mnist_ray")
    return f"{type(error).__name__}: {first_line(error)} ({Path(place.filename).name}, line {place.lineno})"


def _train(spec: LoopSpec) -> None:
    keep_freed_memory()
    context = ray.train.get_context()
    group = engine.Group(context.get_world_rank(), context.get_world_size(), get_device())
    assigned_cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    batch_size = spec.config.batch_size // group.world_size
    threads = threads_per_worker(assigned_cpus, usable_cores(), context.get_local_world_size(), batch_size)
    torch.set_num_threads(threads)
    split = ray.get(spec.split)

    state = engine.create_state(spec.config, len(split), group.device)
    restored = checkpoints.restore_newest(spec.run, state)
    if not restored.name and not restored.damaged and ray.train.get_checkpoint():
        raise JobError(f"{spec.run.uri} does not show the checkpoints that were written there")  # and so try again
    config = replace(spec.config, precision=engine.resolve_precision(spec.config.precision, group))
    reporter = _Reporter(spec, group, restored)
    hosts = _hosts(group)
    reporter.send(
        Started(
            group.world_size,
            hosts,
            torch.get_num_threads(),
            group.device.type,
            config.precision,
            state.epoch,
            state.step,
            num_steps(len(split), config.batch_size),
            restored.damaged,
        )
    )
    reporter.report_restored(state)
    hooks = engine.Hooks(reporter.progress, reporter.checkpoint, reporter.wants_checkpoint)
    try:
        engine.train(state, split, config, group, hooks)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _hosts(group: engine.Group) -> tuple[str, ...]:
    """Return the node of each rank, in their order."""
    hosts: list[str] = [""] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(hosts, socket.gethostname())
        return tuple(hosts)
    return (socket.gethostname(),)


class _Reporter:
    """What a worker does besides training: tells the driver, checkpoints, and watches over itself and its node."""

    def __init__(self, spec: LoopSpec, group: engine.Group, restored: checkpoints.Restored) -> None:
        self._spec = spec
        self._restored = restored
        self._is_first = group.rank == 0
        self._validation = ray.get(spec.validation) if spec.validation and self._is_first else None
        self._saved_for_preemption = False
        current = ray.train.get_checkpoint()
        self._known = current.path.rsplit("/", 1)[-1] if current else ""
        # Ray knows a damaged checkpoint by its name still; what takes its place needs another one.
        self._suffix = "b" if self._known in restored.damaged else ""
        end_if_hung(spec.hang_timeout_s)

    def send(self, event: Event) -> None:
        """Tell the driver, on rank 0."""
        if self._is_first and self._spec.events is not None:  # a Queue with nothing in it is false
            self._spec.events.actor.put_nowait.remote(event)

    def progress(self, progress: Progress) -> None:
        """Note that training goes on."""
        end_if_hung(self._spec.hang_timeout_s)
        self.send(progress)

    def wants_checkpoint(self) -> bool:
        """Return True once where a worker's node is about to be taken away."""
        if self._saved_for_preemption or ray.train.get_preemption_info() is None:
            return False
        self._saved_for_preemption = True
        self.send(NodeLeaving())
        return True

    def report_restored(self, state: engine.TrainingState) -> None:
        """Report the checkpoint that this run goes on from, where a kill came between its upload and Ray's noting it.

        Else a run whose last checkpoint it is would end without it.
        """
        name = self._restored.name
        if name <= self._known:  # names sort as the training goes
            return
        saved = self._spec.run.inside(name)
        ray.train.report(
            self._restored.metrics,
            checkpoint=Checkpoint(saved.path, filesystem=saved.filesystem) if self._is_first else None,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
            validation=self._is_to_be_validated(state),
        )

    def _is_to_be_validated(self, state: engine.TrainingState) -> bool:
        """Tell whether this rank asks for a validation: the one that brings the checkpoint, at an epoch's end."""
        return self._is_first and state.step == 0 and self._spec.validates_in_tasks

    def checkpoint(self, state: engine.TrainingState, progress: Progress) -> None:
        """Hand a checkpoint to Ray Train, on all ranks at once; rank 0 writes it. An epoch's last is validated."""
        if state.step == 0:
            self.send(EpochFinished(progress))
        metrics = report_metrics(state, progress, self._validation)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if self._is_first:
                about = self._spec.about | {"metrics": metrics, "versions": versions()}
                checkpoints.save_checkpoint(Path(folder), state, about)
                checkpoint = Checkpoint.from_directory(folder)
                checkpoint.set_metadata({"epoch": state.epoch})
            ray.train.report(
                metrics,
                checkpoint=checkpoint,
                checkpoint_dir_name=checkpoint_name(state) + self._suffix,
                checkpoint_upload_fn=self._upload,
                validation=self._is_to_be_validated(state),
            )
        end_if_hung(self._spec.hang_timeout_s)

    def _upload(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        target = self._spec.run.inside(name)
        target.upload(checkpoint.path)
        return Checkpoint(target.path, filesystem=target.filesystem)


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
