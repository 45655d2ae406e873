"""What each worker of a run does: the training loop of plain PyTorch, told to Ray Train."""

from __future__ import annotations

import faulthandler
import functools
import shutil
import socket
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import get_device

from mnist_ray.cluster.environment import end_if_hung, keep_freed_memory
from mnist_ray.cluster.plan import threads_per_worker, usable_cores
from mnist_ray.cluster.remote_data import RemoteSplit
from mnist_ray.config import TrainConfig
from mnist_ray.errors import JobError, with_place
from mnist_ray.provenance import arithmetic, versions
from mnist_ray.run.failures import PASSING, CodeFailedError, is_of_gloo
from mnist_ray.storage import RunFolder, checkpoint_name, position_of
from mnist_ray.training import checkpoint as checkpoints
from mnist_ray.training import engine
from mnist_ray.training.callback import Callback
from mnist_ray.training.debug import Profiler, anomalies_found
from mnist_ray.training.events import EpochFinished, Event, NodeLeaving, Progress, Started, StoppedEarly, Validated
from mnist_ray.training.metrics import score
from mnist_ray.training.reproducible import OtherArithmeticError, check_arithmetic
from mnist_ray.workload import user_code
from mnist_ray.workload.base import Workload
from mnist_ray.workload.data import Split
from mnist_ray.workload.user_code import Source


@dataclass(frozen=True)
class LoopSpec:
    """What every worker is handed."""

    workload: Workload
    config: TrainConfig
    train: RemoteSplit
    run: RunFolder
    """Where the checkpoints are."""
    event_queue: Any
    """The actor that rank 0 tells how it goes; None where nobody listens."""
    about: dict[str, Any]
    """Written into every checkpoint."""
    hang_timeout_s: float
    """A worker that takes no step for so long ends itself."""
    loader_workers: int = 0
    """Processes that read a ``Dataset``."""
    validates_in_tasks: bool = False
    """Whether each epoch's checkpoint is validated by a task beside the training."""
    validation: RemoteSplit | None = None
    """Examples that the workers evaluate themselves before they report: whether they go on depends on it."""
    callback: Source | None = None
    """The user's code in the training loop."""
    profile: int | None = None
    """Steps to profile."""
    detect_anomaly: bool = False

    @property
    def folders(self) -> list[Path]:
        """Where the user's code is."""
        return user_code.folders_of(self.callback, self.workload.source)


def train_loop_per_worker(loop_config: dict[str, LoopSpec]) -> str | None:
    """Train on one worker; every rank runs this. Return why training stopped early, or None where it is done.

    Where it was asked to stop, that is empty. Raises CodeFailedError where the code failed, and what else failed as it
    is.
    """
    spec = loop_config["spec"]
    try:
        _train(spec)
    except (checkpoints.OtherModelError, engine.TrainingDivergedError, OtherArithmeticError) as error:
        return str(error)  # not raised: Ray would take it for a lost worker and try again
    except engine.StopWantedError:
        return ""
    except (CodeFailedError, *PASSING):
        raise
    except Exception as error:
        if is_of_gloo(error):
            raise
        raise CodeFailedError(with_place(error, *spec.folders)) from error
    return None


def _train(spec: LoopSpec) -> None:
    keep_freed_memory()
    context = ray.train.get_context()
    group = engine.Group(context.get_world_rank(), context.get_world_size(), get_device())
    assigned_cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    batch_size = spec.config.batch_size // group.world_size
    threads = threads_per_worker(assigned_cpus, usable_cores(), context.get_local_world_size(), batch_size)
    torch.set_num_threads(1 if spec.config.reproducible else threads)
    split = spec.train.open()

    callbacks = callbacks_of(spec.callback, spec.profile, spec.run)
    state = engine.create_state(spec.workload, spec.config, len(split), group.device, callbacks)
    restored = checkpoints.restore_newest(spec.run, state)
    if not restored.name and not restored.damaged and ray.train.get_checkpoint():
        raise JobError(f"{spec.run.uri} does not show the checkpoints that were written there")  # and so try again
    config = replace(spec.config, precision=engine.resolve_precision(spec.config.precision, group))
    reporter = _Reporter(spec, group, restored)
    hosts = _hosts(group)
    if spec.config.reproducible:
        check_arithmetic(group.world_size)
    reporter.send(
        Started(
            group.world_size,
            hosts,
            torch.get_num_threads(),
            group.device.type,
            config.precision,
            state.epoch,
            state.step,
            config.num_steps(len(split)),
            restored.damaged,
            _notes(restored),
        )
    )
    reporter.report_restored(state)
    hooks = engine.Hooks(reporter.progress, reporter.checkpoint, reporter.wants_checkpoint, reporter.wants_stop)
    try:
        with anomalies_found(spec.detect_anomaly, *spec.folders):
            engine.train(spec.workload, state, split, config, group, hooks, spec.loader_workers)
    finally:
        faulthandler.cancel_dump_traceback_later()
    if state.epoch < config.num_epochs:
        reporter.send(StoppedEarly(state.epoch, engine.best_epoch(state.scores)))
    reporter.wait_for_driver()


def callbacks_of(source: Source | None, profile: int | None, run: RunFolder) -> list[Callback]:
    """Return the user's callback, which a checkpoint knows by its place, and then our own for ``profile`` steps."""
    callbacks: list[Callback] = [user_code.load(source, Callback)()] if source else []
    return [*callbacks, Profiler(profile, run)] if profile else callbacks


def _hosts(group: engine.Group) -> tuple[str, ...]:
    """Return the node of each rank, in their order."""
    hosts: list[str] = [""] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(hosts, socket.gethostname())
        return tuple(hosts)
    return (socket.gethostname(),)


def _notes(restored: checkpoints.Restored) -> tuple[str, ...]:
    """Return what the user is to know of the checkpoint that the run goes on from."""
    if restored.arithmetic in (None, arithmetic()):
        return ()
    return ("other versions or another processor than before: from here on the bits are others",)


class _Reporter:
    """What a worker does besides training: tells the driver, checkpoints, and watches over itself and its node."""

    def __init__(self, spec: LoopSpec, group: engine.Group, restored: checkpoints.Restored) -> None:
        self._spec = spec
        self._restored = restored
        self._group = group
        self._is_first = group.rank == 0
        self._validation = spec.validation.open() if spec.validation else None
        self._saved_for_preemption = False
        self._uploaded = threading.Event()
        self._uploaded.set()
        self._answers: list[Any] = []
        current = ray.train.get_checkpoint()
        self._known = current.path.rsplit("/", 1)[-1] if current else ""
        # Ray knows a damaged checkpoint by its name still; what takes its place needs another one: with one b more.
        known_bs = len(self._known) - len(self._known.rstrip("b"))
        self._suffix = "b" * (known_bs + 1) if self._known in restored.damaged else ""
        end_if_hung(spec.hang_timeout_s)

    def send(self, event: Event) -> None:
        """Tell the driver, on rank 0."""
        if self._is_first and self._spec.event_queue is not None:
            self._answers.append(self._spec.event_queue.put.remote(event))

    def wait_for_driver(self) -> None:
        """Wait until all events are in the event queue, whose process may start more slowly than a short training ends.

        Done before each checkpoint, too: else its validation, by a task, could be told before the epoch is.
        """
        if self._answers:
            ray.wait(self._answers, num_returns=len(self._answers))

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

    def wants_stop(self) -> bool:
        """Tell whether the driver wants the training to stop, as far as it has answered; asked on rank 0."""
        answered, self._answers = ray.wait(self._answers, num_returns=len(self._answers), timeout=0)
        return any(ray.get(answered))

    def report_restored(self, state: engine.TrainingState) -> None:
        """Report the checkpoint that this run goes on from, where a kill came between its upload and Ray's noting it.

        Else a run whose last checkpoint it is would end without it.
        """
        name = self._restored.name
        if position_of(name) <= position_of(self._known):
            return
        saved = self._spec.run.inside(name)
        self.wait_for_driver()
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
        """Hand a checkpoint to Ray Train, on all ranks at once. An epoch's last is validated.

        Rank 0 copies the state; a thread of Ray's writes and uploads it while the training goes on. Only one upload is
        under way at a time: what comes next waits for it.
        """
        if state.step == 0:
            self.send(EpochFinished(progress))
        metrics = report_metrics(self._spec.workload, state, progress)
        if self._validation is not None:
            metrics |= self._validated(state, self._validation)
        checkpoint, upload = None, None
        if self._is_first:
            self._uploaded.wait()
            about = self._spec.about | {"metrics": metrics, "versions": versions()}
            if self._spec.config.reproducible:
                about["arithmetic"] = arithmetic()
            checkpoint = Checkpoint.from_directory(tempfile.mkdtemp())
            upload = functools.partial(self._upload, checkpoints.snapshot(state, about))
            self._uploaded.clear()
        self.wait_for_driver()
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_dir_name=checkpoint_name(state.epoch, state.step) + self._suffix,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=False,  # it is deleted however its upload ends
            validation=self._is_to_be_validated(state),
        )
        end_if_hung(self._spec.hang_timeout_s)

    def _validated(self, state: engine.TrainingState, split: Split) -> dict[str, float]:
        start, spec = time.perf_counter(), self._spec
        values, metrics = validate(spec.workload, state, split, spec.config, self._group, spec.loader_workers)
        if state.step == 0:
            self.send(Validated(state.epoch, values, time.perf_counter() - start, is_beside=False))
        return metrics

    def _upload(self, snapshot: checkpoints.Snapshot, checkpoint: Checkpoint, name: str) -> Checkpoint:
        target = self._spec.run.inside(name)
        try:
            snapshot.write(Path(checkpoint.path))
            checkpoint.set_metadata({"epoch": snapshot.document["epoch"]})
            target.upload(checkpoint.path)
        finally:
            shutil.rmtree(checkpoint.path, ignore_errors=True)
            self._uploaded.set()
        return Checkpoint(target.path, filesystem=target.filesystem)


def report_metrics(workload: Workload, state: engine.TrainingState, progress: Progress) -> dict[str, float]:
    """Return what is reported with a checkpoint."""
    return {
        "epoch": state.epoch,
        "step": state.step,
        "epochs": state.epoch + state.step / progress.num_steps,
        **{f"train_{name}": value for name, value in progress.so_far.items()},
        workload.rate: progress.examples_per_s,
        "train_s": state.finished_s + state.epoch_s,
    }


def validate(
    workload: Workload,
    state: engine.TrainingState,
    split: Split,
    config: TrainConfig,
    group: engine.Group,
    loader_workers: int = 0,
) -> tuple[dict[str, float], dict[str, float]]:
    """Validate what has been trained so far, on all ranks at once; ``state`` notes an epoch's score.

    Returns loss and metrics, and what is reported of them: also ``is_over``, whether the training is. Raises what
    ``engine.evaluate`` does.
    """
    values = engine.evaluate_together(workload, state.result, split, group, loader_workers).values(workload)
    if state.step == 0:
        state.scores.append(score(workload, values))
    return values, validation_metrics(workload, values) | {"is_over": engine.is_over(state, config)}


def validation_metrics(workload: Workload, values: dict[str, float]) -> dict[str, float]:
    """Return what is reported of a validation: its figures, and the score by which Ray keeps the best checkpoints."""
    return {f"val_{name}": value for name, value in values.items()} | {"val_score": score(workload, values)}
