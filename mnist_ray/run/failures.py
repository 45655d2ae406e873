"""What went wrong in a worker: what may go well at the next attempt, what is a bug, and each in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from ray.exceptions import RayActorError, RayError
from ray.train import UserCallback

from mnist_ray.cluster.train_internals import RayTrainError, WorkerHealthCheckFailedError
from mnist_ray.errors import JobError, first_line
from mnist_ray.storage import STORAGE_ERRORS
from mnist_ray.training.events import WorkersLost
from mnist_ray.training.state import CodeFailedError

PASSING = (
    *STORAGE_ERRORS,
    JobError,
    MemoryError,
    RayError,
    RayTrainError,
    torch.AcceleratorError,
    torch.distributed.DistError,
)
"""What may go well at the next attempt; other errors of the training's own code are bugs."""


class TrainingStoppedError(JobError):
    """Training cannot go on with these settings: doing it again would end the same way."""


class FailureReporter(UserCallback):
    """Tells the driver, if it has an event queue, why workers are replaced; if that cannot help, ends the run."""

    def __init__(self, event_queue: Any) -> None:
        self._event_queue = event_queue

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Do it, for the exceptions of each rank that failed."""
        for error in worker_exceptions.values():
            if isinstance(error, CodeFailedError):
                # Raised here, Ray takes it for a failure of its own controller, after which it does not try again.
                raise TrainingStoppedError(str(error))
        if self._event_queue is not None:
            self._event_queue.put.remote(WorkersLost(describe(worker_exceptions)))


def is_of_gloo(error: BaseException) -> bool:
    """Tell whether another worker has gone while this one waited for it: gloo raises a plain RuntimeError then."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


def describe(worker_exceptions: Mapping[int, Exception]) -> str:
    """Say in one line what happened to workers, by rank: a death, which makes the others fail too, before the rest."""
    rank, error = min(worker_exceptions.items(), key=lambda item: (not isinstance(item[1], RayActorError), item[0]))
    cause = getattr(error, "_base_exc", error)
    if is_of_gloo(cause):
        return f"worker {rank} has lost its connection to another, which has died or hangs"
    if isinstance(error, WorkerHealthCheckFailedError):
        return f"worker {rank} does not answer"
    if not isinstance(error, RayActorError):
        return f"worker {rank} failed: {_said(cause)}"
    if error.preempted:
        return f"worker {rank} was lost with its node, which was preempted"
    # That an actor's node has died, Ray says in words only.
    has_lost_node = any("node" in line and ("died" in line or "dead" in line) for line in str(error).splitlines())
    return f"worker {rank} was lost with its node" if has_lost_node else f"worker {rank} died"


def reason_of(error: Exception) -> str:
    """Say in one line why training failed: a worker's own exception if there is one."""
    if failures := getattr(error, "worker_failures", None):
        return describe(failures)
    cause = getattr(error, "controller_failure", error)
    cause = getattr(cause, "cause", cause)  # of a RayTaskError, whose own text is a traceback
    return f"Ray Train failed: {_said(cause)}"


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error) if str(error).strip() else 'no message'}"
