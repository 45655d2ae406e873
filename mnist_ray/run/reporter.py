"""A worker of Ray Train: what it tells the driver, and how its checkpoints get to Ray."""

from __future__ import annotations

import functools
import threading
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import get_device

from mnist_ray.cluster.environment import end_if_hung
from mnist_ray.config import TrainConfig
from mnist_ray.errors import JobError, with_place
from mnist_ray.run.failures import PASSING, is_of_gloo
from mnist_ray.run.worker import LoopSpec, Reporter, train_worker
from mnist_ray.storage import checkpoint_name, position_of
from mnist_ray.training import checkpoint as checkpoints
from mnist_ray.training.events import Event, NodeLeaving, Progress
from mnist_ray.training.metrics import TrainingDivergedError
from mnist_ray.training.reproducible import OtherArithmeticError
from mnist_ray.training.state import CodeFailedError, Group, StopWantedError, TrainingState


def train_loop_per_worker(loop_config: dict[str, LoopSpec]) -> str | None:
    """Train on one worker of Ray Train; every rank runs this. Return why training stopped early; None if it is done.

    If it was asked to stop, that is empty. Raises CodeFailedError if the code failed, and what else failed as it is.
    """
    spec = loop_config["spec"]
    try:
        train_rank(spec)
    except (checkpoints.OtherModelError, TrainingDivergedError, OtherArithmeticError) as error:
        return str(error)  # not raised: Ray would take it for a lost worker and try again
    except StopWantedError:
        return ""
    except (CodeFailedError, *PASSING):
        raise
    except Exception as error:
        if is_of_gloo(error):
            raise
        raise CodeFailedError(with_place(error, *spec.job.code_folders)) from error
    return None


def train_rank(spec: LoopSpec) -> None:
    """Train as the rank that Ray Train says."""
    context = ray.train.get_context()
    group = Group(context.get_world_rank(), context.get_world_size(), get_device())
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    train_worker(spec, group, TrainReporter, cpus, context.get_local_world_size())


class TrainReporter(Reporter):
    """Reports to the driver's event queue, and checkpoints to Ray Train; watches over its node."""

    def __init__(self, spec: LoopSpec, group: Group, config: TrainConfig) -> None:
        super().__init__(spec, group, config)
        self._saved_for_preemption = False
        self._uploaded = threading.Event()
        self._uploaded.set()
        self._answers: list[Any] = []
        current = ray.train.get_checkpoint()
        self._known = current.path.rsplit("/", 1)[-1] if current else ""

    def begin(self, state: TrainingState, restored: checkpoints.Restored) -> None:
        """Report it. Raises JobError if the storage does not show the checkpoints that Ray knows."""
        if not restored.name and not restored.damaged and self._known:
            raise JobError(f"{self._job.run.uri} does not show the checkpoints that were written there")  # try again
        # Ray knows a damaged checkpoint by its name still; what takes its place needs another one: with one b more.
        known_bs = len(self._known) - len(self._known.rstrip("b"))
        self._suffix = "b" * (known_bs + 1) if self._known in restored.damaged else ""
        self.send(self.started(state, restored))
        self._report_restored(state, restored)

    def end(self, state: TrainingState) -> None:
        """Tell of an early end, and wait until all that was sent has come."""
        super().end(state)
        self._wait_for_driver()

    def send(self, event: Event) -> None:
        """Tell the driver, on rank 0."""
        if self._is_first and self._spec.event_queue is not None:
            self._answers.append(self._spec.event_queue.put.remote(event))

    def _wait_for_driver(self) -> None:
        """Wait until all events are in the queue, whose process may start more slowly than a short training ends.

        Done before each checkpoint, too: else its validation, by a task, could be reported before the epoch is.
        """
        if self._answers:
            ray.wait(self._answers, num_returns=len(self._answers))

    def on_progress(self, state: TrainingState, progress: Progress) -> None:
        """Send it."""
        super().on_progress(state, progress)
        self.send(progress)

    def wants_checkpoint(self) -> bool:
        """Return True once if a worker's node is about to be taken away."""
        if self._saved_for_preemption or ray.train.get_preemption_info() is None:
            return False
        self._saved_for_preemption = True
        self.send(NodeLeaving())
        return True

    def wants_stop(self) -> bool:
        """Tell whether the driver wants the training to stop, as far as it has answered; it answers rank 0 only."""
        if not self._answers:
            return False
        answered, self._answers = ray.wait(self._answers, num_returns=len(self._answers), timeout=0)
        return any(ray.get(answered))

    def _report_restored(self, state: TrainingState, restored: checkpoints.Restored) -> None:
        """Report the checkpoint that this run goes on from, if a kill came between its upload and Ray's noting it.

        Else a run whose last checkpoint it is would end without it.
        """
        if position_of(restored.name) <= position_of(self._known):
            return
        self._wait_for_driver()
        ray.train.report(
            restored.metrics,
            checkpoint=self._checkpoint(restored.name) if self._is_first else None,
            checkpoint_dir_name=restored.name,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
            validation=self._is_to_be_validated(state),
        )

    def _checkpoint(self, name: str) -> Checkpoint:
        folder = self._job.run.inside(name)
        return Checkpoint(folder.path, filesystem=folder.filesystem)

    def _is_to_be_validated(self, state: TrainingState) -> bool:
        """Tell whether this rank asks for a validation: the one that brings the checkpoint, at an epoch's end."""
        return self._is_first and state.step == 0 and self._spec.validates_in_tasks

    def on_checkpoint(self, state: TrainingState, progress: Progress) -> None:
        """Hand a checkpoint to Ray Train, on all ranks at once. An epoch's last is validated.

        Rank 0 copies the state; a thread of Ray's writes and uploads it while the training goes on. Only one upload is
        under way at a time: what comes next waits for it.
        """
        metrics = self.measured(state, progress)
        name, upload = checkpoint_name(state.epoch, state.step) + self._suffix, None
        if self._is_first:
            self._uploaded.wait()
            upload = functools.partial(self._upload, self.snapshot(state, metrics))
            self._uploaded.clear()
        self._wait_for_driver()
        ray.train.report(
            metrics,
            checkpoint=self._checkpoint(name) if self._is_first else None,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=False,  # there is no local one
            validation=self._is_to_be_validated(state),
        )
        end_if_hung(self._job.workers.hang_timeout_s)

    def _upload(self, snapshot: checkpoints.Snapshot, checkpoint: Checkpoint, name: str) -> Checkpoint:
        try:
            snapshot.write(self._job.run.inside(name))
        finally:
            self._uploaded.set()
        return checkpoint
