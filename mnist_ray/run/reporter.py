"""The training function that Ray Train calls on each worker, and its reports to the driver and to Ray."""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero

from mnist_ray.checkpoints.checkpoint import Restored
from mnist_ray.checkpoints.summary import CheckpointMetrics
from mnist_ray.cluster.devices import device_here
from mnist_ray.config import TrainConfig
from mnist_ray.job.find import drop_worse
from mnist_ray.parallel.group import Group
from mnist_ray.ray_versions import preemption_info
from mnist_ray.run.failures import code_failures_placed
from mnist_ray.run.worker import LoopSpec, Reporter, train_worker
from mnist_ray.storage import CONFIG_FILE, with_retries
from mnist_ray.training.events import Event, NodeLeaving, Note, Outcome, Progress
from mnist_ray.training.metrics import TrainingDivergedError
from mnist_ray.training.state import StopWantedError, TrainingState

_ASK_INTERVAL_S = 5.0  # of training, between two checks for preempted nodes: every tenth window
_SPARE_S = 2.0  # between a saved checkpoint and a node's preemption


def train_loop_per_worker(loop_config: dict[str, LoopSpec]) -> None:
    """Train on one worker of Ray Train; every rank calls this. Rank 0 reports to the driver's event queue how it ended.

    Raises TrainingStoppedError if the code has a bug; other failures unchanged. If the loss is not finite, a run
    returns normally, because only then does Ray wait for a checkpoint's upload; a trial, without a queue, raises.
    """
    spec, outcome = loop_config["spec"], Outcome()
    try:
        with code_failures_placed(*spec.job.code_folders):
            train_rank(spec)
    except TrainingDivergedError as error:
        if spec.event_queue is None:
            raise
        outcome = Outcome(diverged=error)
    except StopWantedError:
        outcome = Outcome(is_stopped=True)
    if spec.event_queue is not None and ray.train.get_context().get_world_rank() == 0:
        ray.get(spec.event_queue.put.remote(outcome))


def train_rank(spec: LoopSpec) -> None:
    """Train as this worker's rank, on its device."""
    context = ray.train.get_context()
    group = Group(context.get_world_rank(), context.get_world_size(), device_here())
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    train_worker(spec, group, TrainReporter, cpus, context.get_local_world_size())


class TrainReporter(Reporter):
    """Reports to the driver's event queue, saves while training continues, and watches for its node's preemption."""

    waits_for_storage = False

    def __init__(self, spec: LoopSpec, group: Group, config: TrainConfig) -> None:
        super().__init__(spec, group, config)
        self._trained_s = self._next_question_s = self._asked_clock_s = 0.0
        self._saved_for: set[tuple[object, ...]] = set()
        self._answers: list[Any] = []
        if spec.event_queue is not None:  # else a trial, whose folder its workers make
            with_retries(self._find_run)
        if "RAY_DEBUG" not in os.environ:  # Ray would skip breakpoints silently
            sys.breakpointhook = self._pass_over_breakpoint

    def _pass_over_breakpoint(self, *arguments: Any, **options: Any) -> None:
        sys.breakpointhook = lambda *arguments, **options: None
        self.send(Note("skipped a breakpoint: nobody can reach a debugger in a worker; use --num-workers 0"))

    def _find_run(self) -> None:
        """Raise a storage error if this node does not (or not yet) see the run."""
        if not self._job.run.exists(CONFIG_FILE):
            place = f"{socket.gethostname()} does not see {self._job.run.inside(CONFIG_FILE).uri}"
            raise FileNotFoundError(f"{place}, which the job has written; use a storage that all nodes share")

    def on_restored(self, state: TrainingState, restored: Restored, hosts: Sequence[str]) -> None:
        """Report the start and, since a kill may have lost it, the last validation."""
        super().on_restored(state, restored, hosts)
        if restored.metrics.is_validated and state.step == 0:
            self.send_validation(state.epoch, restored.metrics)
        if restored.name:
            self._report(restored.metrics)

    def end(self, state: TrainingState) -> None:
        """Report an early end of training, and wait until the driver's event queue has all events."""
        super().end(state)
        self._wait_for_driver()

    def send(self, event: Event) -> None:
        """On rank 0, send an event to the driver."""
        if self._is_first and self._spec.event_queue is not None:
            self._answers.append(self._spec.event_queue.put.remote(event))

    def _wait_for_driver(self) -> None:
        """Wait until all events are in the queue: a short training may end before the queue's process starts."""
        if self._answers:
            ray.wait(self._answers, num_returns=len(self._answers))

    def on_progress(self, state: TrainingState, progress: Progress) -> None:
        """Send the progress to the driver."""
        self._trained_s = state.finished_s + state.epoch_s
        self.send(progress)

    def wants_checkpoint(self) -> bool:
        """Return True when Ray announces that a worker's node will be preempted, and again shortly before it is."""
        if self._spec.is_local or self._trained_s < self._next_question_s:
            return False
        info = preemption_info()  # all ranks ask together, and wait for each other
        if info is None:
            self._next_question_s = self._trained_s + _ASK_INTERVAL_S  # by rank 0's clock, which all ranks know
            return False
        left_s, is_last_chance = broadcast_from_rank_zero(self._time_left(info.deadline_ms))
        reason = (*info.preempted_node_ids, is_last_chance)
        if reason in self._saved_for:
            return False
        self._saved_for.add(reason)
        self.send(NodeLeaving(left_s))
        return True

    def _time_left(self, deadline_ms: int | None) -> tuple[float, bool]:
        """Return the seconds until a deadline, and whether this is the last window to save a checkpoint in time."""
        now, asked_at = time.time(), self._asked_clock_s
        self._asked_clock_s = now
        left_s = math.inf if deadline_ms is None else deadline_ms / 1000 - now
        return left_s, left_s < _SPARE_S + self._saving_s + (now - asked_at if asked_at else 0)

    def wants_stop(self) -> bool:
        """Return whether the driver has answered that the training must stop; only rank 0 gets the driver's answers."""
        if not self._answers:
            return False
        answered, self._answers = ray.wait(self._answers, num_returns=len(self._answers), timeout=0)
        return any(ray.get(answered))

    def keep(self, state: TrainingState, metrics: CheckpointMetrics) -> None:
        """Save a checkpoint: rank 0 or, if the state is sharded, each rank its part. A trial then reports it."""
        if self._is_first or state.is_sharded:
            self.save(state, metrics, self._drop_worse)
        else:
            for callback in self.callbacks:  # on every rank alike: it may communicate
                callback.state_dict()
        if self._spec.event_queue is None:
            self.finish_saving(state)
            self._report(metrics)

    def _drop_worse(self) -> None:
        if self._is_first:
            drop_worse(self._job.run)

    def _report(self, metrics: CheckpointMetrics) -> None:
        """In a trial, report to the process that passes it on to Tune."""
        if self._spec.event_queue is None:
            ray.train.report(metrics.to_dict())
