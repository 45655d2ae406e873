"""``--num-workers 0``: training in the job's own process, without Ray, for debuggers, profilers and notebooks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from mnist_ray.checkpoints.find import Fitted, best_of
from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.errors import ExampleError, JobError, UnreadableDataError
from mnist_ray.job.session import Session
from mnist_ray.parallel.group import Group
from mnist_ray.process import usable_cores
from mnist_ray.run.worker import LoopSpec, Sink, train_worker
from mnist_ray.signals import Noted, first_only_noted
from mnist_ray.training.events import Event, Stopping
from mnist_ray.training.state import StopWantedError


def fit_here(
    session: Session, plan: WorkerPlan, on_event: Callable[[Event], None], until_epoch: float = math.inf
) -> Fitted:
    """Train in this process, and return the same as ``fit``. Raises the same errors, and those of the user's code."""
    job, data = session.job, session.data
    validation = data.validation if len(data.validation) else None
    spec = LoopSpec(job=job, train=data.train, validation=validation, until_epoch=until_epoch)
    group = Group(device=torch.device("cuda" if plan.use_gpu else "cpu"))
    try:
        with first_only_noted() as interrupted:
            train_worker(spec, group, LocalSink(on_event, interrupted), job.workers.cpus_per_worker or usable_cores())
    except ExampleError as error:
        if error.__cause__ is not None:
            raise  # an error of the user's code: its traceback helps
        raise UnreadableDataError(str(error)) from None
    except StopWantedError as stop:
        if not interrupted.is_set and math.isinf(until_epoch):
            raise JobError("a callback has stopped the training") from stop
    if interrupted.is_set:
        raise KeyboardInterrupt
    return best_of(job.run)


class LocalSink(Sink):
    """Passes events on in this process."""

    def __init__(self, on_event: Callable[[Event], None], interrupted: Noted) -> None:
        self._on_event, self._interrupted, self._is_stopping = on_event, interrupted, False

    def send(self, event: Event) -> None:
        """Pass on an event."""
        self._on_event(event)

    def stop_requested(self) -> bool:
        """Return whether Ctrl-C was pressed, and report that once."""
        if self._interrupted.is_set and not self._is_stopping:
            self._is_stopping = True
            self.send(Stopping())
        return self._is_stopping
