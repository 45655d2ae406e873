"""A run from start to end: trained by Ray Train's workers, or in this process; then tested."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer

from mnist_ray.checkpoints.find import best_of, read_initial
from mnist_ray.cluster.devices import usable
from mnist_ray.cluster.nodes import Waiting, check_nodes, temporary_folder
from mnist_ray.cluster.plan import WorkerPlan, plan_workers
from mnist_ray.cluster.remote_data import share
from mnist_ray.cluster.watch import MAX_SILENCE_S, RaySilentError, as_raised
from mnist_ray.errors import ExampleError, JobError, UnreadableDataError
from mnist_ray.job.session import Session
from mnist_ray.parallel.group import Group
from mnist_ray.process import in_thread, usable_cores
from mnist_ray.provenance import versions
from mnist_ray.record.recorder import recorded
from mnist_ray.run import evaluate
from mnist_ray.run.failures import error_of
from mnist_ray.run.ray_train import create_trainer, open_event_queue
from mnist_ray.run.worker import LoopSpec, Sink, train_worker
from mnist_ray.schema import INITIAL_FILE
from mnist_ray.signals import InterruptFlag, defer_first_interrupt
from mnist_ray.storage import RunFolder, in_one_line
from mnist_ray.text import format_settings
from mnist_ray.training.events import STOPPING, ControllerAlive, Event, Note, Outcome, Started, WorkersLost
from mnist_ray.training.state import StopWantedError

_POLL_INTERVAL_S = 0.5  # between the driver's requests for events; workers send their progress at the same interval
_START_INTERVAL_S = 0.1  # the same, while no workers train
_END_TIMEOUT_S = 5.0  # for Ray Train's controller to end, if the run ends first


def plan(session: Session) -> WorkerPlan:
    """Return how many workers train, and on what. Raises UsageError; TrainingStoppedError if a GPU is of no use."""
    use_gpu, chunks = session.workers.use_gpu, session.job.train.reproducible_chunks
    if not session.is_here:
        return plan_workers(session.workers, session.cluster, chunks)
    is_on_gpu = use_gpu == "yes" or (use_gpu == "auto" and chunks is None and torch.cuda.is_available())
    if is_on_gpu:
        usable(torch.device("cuda"))
    return WorkerPlan(0, 0, is_on_gpu, must_scale_up=False)


def train_run(
    session: Session,
    plan: WorkerPlan,
    *,
    until_epoch: float = math.inf,
    trained: RunFolder | None = None,
    is_tested: bool = True,
    is_last: bool = True,
    on_event: Callable[[Event], None] = lambda event: None,
) -> None:
    """Train a run from its last checkpoint, test and report it. Raises like ``fit``.

    ``until_epoch``: where to stop; a member of a sweep goes on from there later. ``trained``: the checkpoint to test of
    a run that needs no training. ``is_last``: nothing needs the cluster after the test.
    """

    def record_event(event: Event) -> None:
        record.on_event(event)
        on_event(event)

    is_end = until_epoch >= session.job.train.num_epochs
    with recorded(session, plan, is_end=is_end) as record:  # writes a report however the run ends
        if trained is None:
            train = fit_here if session.is_here else fit
            trained = train(session, plan, record_event, until_epoch)
        if is_tested:
            evaluate.evaluate_fitted(session, plan, record, trained, is_last=is_last)


def fit_here(
    session: Session, plan: WorkerPlan, on_event: Callable[[Event], None], until_epoch: float = math.inf
) -> RunFolder:
    """Train in this process, without Ray: ``--num-workers 0``, for debuggers, profilers and notebooks.

    Returns the same as ``fit``. Raises the same errors, and those of the user's code.
    """
    job, data = session.job, session.data
    spec = LoopSpec(job=job, train=data.train, validation=data.validation_sets, until_epoch=until_epoch)
    group = Group(device=torch.device("cuda" if plan.use_gpu else "cpu"))
    try:
        with defer_first_interrupt() as interrupted:
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

    def __init__(self, on_event: Callable[[Event], None], interrupted: InterruptFlag) -> None:
        self._on_event, self._interrupted, self._is_stopping = on_event, interrupted, False

    def send(self, event: Event) -> None:
        """Pass on an event."""
        self._on_event(event)

    def stop_requested(self) -> bool:
        """Return whether Ctrl-C was pressed, and report that once."""
        if self._interrupted.is_set and not self._is_stopping:
            self._is_stopping = True
            self.send(STOPPING)
        return self._is_stopping


def fit(
    session: Session, plan: WorkerPlan, on_event: Callable[[Event], None], until_epoch: float = math.inf
) -> RunFolder:
    """Train on Ray, from the last checkpoint if there is one; pass events on; return the best checkpoint.

    Raises TrainingStoppedError if a retry would fail too; otherwise JobError. After Ctrl-C, KeyboardInterrupt.
    """
    job = session.job
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(job.workers.hang_timeout_s))
    if plan.min_workers is not None:  # how long Ray waits to replace a lost node's workers before it runs fewer
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    event_queue = open_event_queue()  # its process starts while the data are shared
    spec = LoopSpec(
        job=job,
        train=share(job.workload, session.data.train),
        validation=[share(job.workload, split) for split in session.data.validation_sets],
        until_epoch=until_epoch,
        event_queue=event_queue,
        is_local=plan.is_local,
    )
    with temporary_folder() as folder:
        outcome = fit_and_listen(create_trainer(spec, plan, folder), event_queue, on_event)
    if outcome.diverged is not None:
        raise outcome.diverged
    if outcome.is_stopped and math.isinf(until_epoch):  # after Ctrl-C, fit_and_listen has raised KeyboardInterrupt
        raise JobError("a callback has stopped the training")
    with in_one_line("the storage has failed"):
        return best_of(job.run)


def fit_and_listen(trainer: TorchTrainer, event_queue: Any, on_event: Callable[[Event], None]) -> Outcome:
    """Fit in another thread, while this thread passes events on and handles Ctrl-C; return how training ended.

    Ray replaces lost workers, and those whose storage has failed. At the first Ctrl-C, workers save a checkpoint if
    they are training; then this raises KeyboardInterrupt. Raises like ``fit``.
    """
    listener = _Listener(in_thread(trainer.fit), event_queue, on_event)
    try:
        with defer_first_interrupt() as interrupted:
            listener.listen(interrupted)
        if interrupted.is_set:
            raise KeyboardInterrupt
        listener.result.result()
        return listener.outcome
    except BaseException as error:
        if not isinstance(error, RaySilentError):
            listener.end()
        if isinstance(error, (ray.train.TrainingFailedError, RayError)):
            raise error_of(error, listener.last_loss) from error
        raise


class _Listener:
    """Listens to the workers and to Ray Train's controller, which starts and watches them, while a thread fits."""

    def __init__(self, result: Future[ray.train.Result], event_queue: Any, on_event: Callable[[Event], None]) -> None:
        self.result, self.outcome, self.last_loss = result, Outcome(), ""
        self._event_queue, self._on_event = event_queue, on_event
        self._is_training = self._is_stopping = False
        self._controller: Any = None  # its actor, once it has started
        self._alive_at = 0.0  # when the controller last showed life
        self._waiting = Waiting("the workers to start", lambda text: on_event(Note(text)))

    def listen(self, interrupted: InterruptFlag) -> None:
        """Pass events on until there is a result or, after Ctrl-C, until no worker is training."""
        is_running = True
        while is_running and (self._is_training or not interrupted.is_set):
            interval = _POLL_INTERVAL_S if self._is_training else _START_INTERVAL_S
            is_running = bool(wait([self.result], interval).not_done)  # checked before the last events are taken
            for event in self._taken():
                self._pass_on(event)  # may take long if the terminal or the storage is slow
            self._waiting.look(is_waiting=not self._is_training)
            if interrupted.is_set and self._is_training and not self._is_stopping:
                self._is_stopping = True
                self._event_queue.request_stop.remote()
                self._on_event(STOPPING)

    def _taken(self) -> list[Event]:
        """Return the new events. Raises RaySilentError if the queue or the controller shows no life for too long."""
        answer = self._event_queue.take.remote()
        with as_raised():
            if not ray.wait([answer], timeout=MAX_SILENCE_S)[0]:
                raise RaySilentError.of("the event queue of its workers")
            events: list[Event] = ray.get(answer)
        for event in events:
            if isinstance(event, ControllerAlive):
                self._controller, self._alive_at = event.controller, time.monotonic()
        if self._controller is not None and time.monotonic() - self._alive_at > MAX_SILENCE_S:
            with contextlib.suppress(RayError):
                ray.kill(self._controller)  # else it could continue to train once it answers again
            raise RaySilentError.of("Ray Train's controller")
        return [event for event in events if not isinstance(event, ControllerAlive)]

    def _pass_on(self, event: Event) -> None:
        match event:
            case Outcome():
                self.outcome = event
                return
            case Started():
                self._is_training = True
            case WorkersLost(reason):
                self._is_training, self.last_loss = False, reason
        self._on_event(event)

    def end(self) -> None:
        """End the controller, so that its thread stops waiting: else ``ray.shutdown`` may end this process.

        If the controller's process is still starting, this waits for it.
        """
        end = time.monotonic() + _END_TIMEOUT_S
        with contextlib.suppress(RayError, RaySilentError):
            while wait([self.result], _START_INTERVAL_S).not_done and time.monotonic() < end:
                if self._controller is not None:
                    ray.kill(self._controller)
                self._taken()


def check_nodes_for(session: Session, plan: WorkerPlan) -> None:
    """Print where a job would run, and check every node. Raises JobError if a node cannot take part."""
    job, console = session.job, session.console
    if job.initial is not None and not job.initial.exists(INITIAL_FILE):
        console.say("init from", read_initial(job.workload, job.asked["init_from"], job.run.storage_path)[1])
    hosts = ["this process"] if session.is_here else check_nodes(job.run, versions())
    console.say("storage", f"{job.run.storage_path}: read by {', '.join(hosts) or 'no node yet'}")
    for place, values in job.by_place.items():
        console.say("settings", f"{format_settings(values)} (from {place})")
    console.say("check", "this job would run")
