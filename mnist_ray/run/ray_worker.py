"""The training function that Ray Train calls on each worker: it reports to the driver, and watches for preemption."""

from __future__ import annotations

import functools
import math
import os
import socket
import sys
import time
from typing import Any

import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero

from mnist_ray.cluster.devices import device_here
from mnist_ray.parallel.group import Group
from mnist_ray.ray_versions import preemption_info
from mnist_ray.run.failures import code_failures_placed
from mnist_ray.run.worker import LoopSpec, Sink, train_worker
from mnist_ray.storage import CONFIG_FILE, RunFolder, with_retries
from mnist_ray.training.callback import Callback
from mnist_ray.training.events import Event, NodeLeaving, Note, Outcome, Progress
from mnist_ray.training.metrics import TrainingDivergedError
from mnist_ray.training.state import StopWantedError, TrainingState
from mnist_ray.training.stopwatch import Pace

_ASK_INTERVAL_S = 5.0  # of training, between two checks for preempted nodes: every tenth window
_SPARE_S = 2.0  # between a saved checkpoint and a node's preemption


def train_loop_per_worker(loop_config: dict[str, LoopSpec]) -> None:
    """Train on one worker of Ray Train; every rank calls this. Rank 0 reports to the driver's event queue how it ended.

    Raises TrainingStoppedError if the code has a bug; other failures unchanged. If the loss is not finite, returns.
    """
    spec, outcome = loop_config["spec"], Outcome()
    context = ray.train.get_context()
    group = Group(context.get_world_rank(), context.get_world_size(), device_here())
    sink = QueueSink(spec.event_queue, group.rank)
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    policies = [] if spec.is_local else [Preemption(sink)]
    if "RAY_DEBUG" not in os.environ:  # Ray would skip breakpoints silently
        sys.breakpointhook = functools.partial(_pass_over_breakpoint, sink)
    try:
        with code_failures_placed(*spec.job.code_folders):
            with_retries(lambda: _check_visible(spec.job.run))
            train_worker(spec, group, sink, cpus, context.get_local_world_size(), policies)
    except TrainingDivergedError as error:
        outcome = Outcome(diverged=error)
    except StopWantedError:
        outcome = Outcome(is_stopped=True)
    sink.send(outcome)


def _check_visible(run: RunFolder) -> None:
    """Raise a storage error if this node does not (or not yet) see the run."""
    if not run.exists(CONFIG_FILE):
        place = f"{socket.gethostname()} does not see {run.inside(CONFIG_FILE).uri}"
        raise FileNotFoundError(f"{place}, which the job has written; use a storage that all nodes share")


def _pass_over_breakpoint(sink: Sink, *arguments: Any, **options: Any) -> None:
    sys.breakpointhook = lambda *arguments, **options: None
    sink.send(Note("skipped a breakpoint: nobody can reach a debugger in a worker; use --num-workers 0"))


class QueueSink(Sink):
    """Puts the events of rank 0 into the driver's queue. The other ranks send nothing."""

    def __init__(self, event_queue: Any, rank: int) -> None:
        self._put = event_queue.put.remote if rank == 0 else None
        self._answers: list[Any] = []

    def send(self, event: Event) -> None:
        """On rank 0, send an event to the driver; after the last one, wait until all are in the queue."""
        if self._put is not None:
            self._answers.append(self._put(event))
            if isinstance(event, Outcome):  # a short training may end before the queue's process starts
                ray.wait(self._answers, num_returns=len(self._answers))

    def stop_requested(self) -> bool:
        """Return whether the driver has answered that the training must stop."""
        if not self._answers:
            return False
        answered, self._answers = ray.wait(self._answers, num_returns=len(self._answers), timeout=0)
        return any(ray.get(answered))


class Preemption(Callback):
    """Saves a checkpoint when Ray announces that a worker's node will be preempted, and again shortly before it is."""

    def __init__(self, sink: Sink) -> None:
        self._sink, self._pace = sink, Pace()
        self._trained_s = self._next_question_s = self._asked_clock_s = 0.0
        self._saved_for: set[tuple[object, ...]] = set()

    def on_progress(self, state: TrainingState, progress: Progress) -> None:
        """Note the time."""
        self._pace, self._trained_s = state.pace, state.finished_s + state.epoch_s

    def wants_checkpoint(self) -> bool:
        """Ask Ray every five seconds; all ranks ask together, and wait for each other."""
        if self._trained_s < self._next_question_s:
            return False
        info = preemption_info()
        if info is None:
            self._next_question_s = self._trained_s + _ASK_INTERVAL_S  # by rank 0's clock, which all ranks know
            return False
        left_s, is_last_chance = broadcast_from_rank_zero(self._time_left(info.deadline_ms))
        reason = (*info.preempted_node_ids, is_last_chance)
        if reason in self._saved_for:
            return False
        self._saved_for.add(reason)
        self._sink.send(NodeLeaving(left_s))
        return True

    def _time_left(self, deadline_ms: int | None) -> tuple[float, bool]:
        """Return the seconds until a deadline, and whether this is the last window to save a checkpoint in time."""
        now, asked_at = time.time(), self._asked_clock_s
        self._asked_clock_s = now
        left_s = math.inf if deadline_ms is None else deadline_ms / 1000 - now
        return left_s, left_s < _SPARE_S + self._pace.saving_s + (now - asked_at if asked_at else 0)
