"""The training function that Ray Train calls on each worker: it reports to the driver, and watches for preemption."""

from __future__ import annotations

import math
import time
from typing import Any

import ray
import ray.train

from mnist_ray.cluster.devices import device_here
from mnist_ray.parallel.group import Group
from mnist_ray.ray_versions import preemption_info
from mnist_ray.run.failures import code_failures_placed
from mnist_ray.run.worker import LoopSpec, Sink, train_worker
from mnist_ray.training.callback import Callback
from mnist_ray.training.events import Event, NodeLeaving, Outcome, Progress
from mnist_ray.training.metrics import TrainingDivergedError
from mnist_ray.training.state import StopWantedError, TrainingState

_ASK_INTERVAL_S = 5.0  # of training, between two checks for preempted nodes: every tenth window


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
    try:
        with code_failures_placed(*spec.job.code_folders):
            train_worker(spec, group, sink, cpus, context.get_local_world_size(), policies)
    except TrainingDivergedError as error:
        outcome = Outcome(diverged=error)
    except StopWantedError:
        outcome = Outcome(is_stopped=True)
    sink.send(outcome)


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
    """Saves a checkpoint when Ray announces that a worker's node will be preempted."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._trained_s = self._next_question_s = 0.0
        self._saved_for: set[str] = set()  # nodes

    def on_progress(self, state: TrainingState, progress: Progress) -> None:
        """Note the time."""
        self._trained_s = state.finished_s + state.epoch_s  # by rank 0's clock, which all ranks know

    def wants_checkpoint(self) -> bool:
        """Ask Ray every five seconds; all ranks ask together, and wait for each other."""
        if self._trained_s < self._next_question_s:
            return False
        self._next_question_s = self._trained_s + _ASK_INTERVAL_S
        info = preemption_info()
        if info is None or self._saved_for.issuperset(info.preempted_node_ids):
            return False
        self._saved_for.update(info.preempted_node_ids)
        self._sink.send(NodeLeaving(math.inf if info.deadline_ms is None else info.deadline_ms / 1000 - time.time()))
        return True
