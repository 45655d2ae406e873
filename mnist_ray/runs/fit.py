"""``fit``: one training run, by Ray Train's ``TorchTrainer``."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import ray.train
from ray.exceptions import RayError
from ray.train import Checkpoint, ValidationConfig

from mnist_ray import private
from mnist_ray.cluster.leftovers import end_controllers
from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.cluster.sharing import share
from mnist_ray.cluster.watch import LONGEST_SILENCE_S, Ping, RaySilentError, Watch
from mnist_ray.errors import JobError
from mnist_ray.interrupts import Noted, first_only_noted
from mnist_ray.runs import evaluation
from mnist_ray.runs.failures import FailureReporter, TrainingStoppedError, reason_of
from mnist_ray.runs.job import Job, about
from mnist_ray.runs.lookup import best_of, snapshot_of
from mnist_ray.runs.mailbox import open_mailbox
from mnist_ray.runs.trainer import create_trainer
from mnist_ray.runs.worker import LoopSpec
from mnist_ray.storage import STORAGE_ERRORS, RunFolder, with_retries
from mnist_ray.training.events import ControllerStarted, Event, Started, Stopping, WorkersLost
from mnist_ray.workload.data import Parts

_POLL_INTERVAL_S = 0.5  # at which the driver asks for events, as often as workers send their progress
_SAVED_WITHIN_S = 30.0  # after Ctrl-C
_END_TIMEOUT_S = 5.0  # for which the end of Ray Train's controller is waited for where the run ends before


@dataclass(frozen=True)
class Fitted:
    """What a finished run has left."""

    checkpoint: Checkpoint
    """The best by validation; the last where nothing was held out."""
    metrics: dict[str, Any]
    """Those of ``checkpoint``."""


def fit(job: Job, data: Parts, plan: WorkerPlan, on_event: Callable[[Event], None]) -> Fitted:
    """Train on Ray, telling ``on_event`` how it goes; a run that ``job.run`` holds already goes on where it stood.

    Raises TrainingStoppedError where it would end the same way again, JobError where training failed otherwise.
    """
    workload, workers, mailbox = job.workload, job.workers, open_mailbox()
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(workers.hang_timeout_s))
    if plan.min_workers is not None:  # so long Ray waits in vain for as many as before, when a node has gone
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    validation_config, validation = None, None
    if job.train.early_stop is not None:
        validation = share(workload, data.validation)
    elif len(data.validation):
        part = share(workload, data.validation)
        validate = functools.partial(
            evaluation.validate, part=part, mailbox=mailbox, loader_workers=workers.loader_workers
        )
        # Without CPUs of its own, validation starts also while the workers hold all of them.
        options = {"num_cpus": 0, **evaluation.process_options()}
        validation_config = ValidationConfig(validate, ray_remote_kwargs=options)
    evaluation.start_process()
    spec = LoopSpec(
        workload,
        job.train,
        share(workload, data.train),
        job.run,
        mailbox,
        about(job),
        workers.hang_timeout_s,
        workers.loader_workers,
        validates_in_tasks=validation_config is not None,
        validation=validation,
        callback=job.callback,
        profile=job.output.profile,
        detect_anomaly=job.output.detect_anomaly,
    )

    damaged: set[str] = set()

    def on_event_here(event: Event) -> None:
        if isinstance(event, Started):
            damaged.update(event.damaged)
        on_event(event)

    def attempt() -> ray.train.Result:
        drop_damaged_snapshot(job.run)
        reporter = FailureReporter(mailbox)
        return create_trainer(spec, plan, workers.max_failures, validation_config, [reporter]).fit()

    result = _with_storage_failures(attempt, workers.max_failures, job.run, mailbox, on_event_here)
    if result.return_value is not None:
        raise TrainingStoppedError(result.return_value)
    return Fitted(*best_of(result, damaged))


def _with_storage_failures(
    attempt: Callable[[], ray.train.Result],
    max_failures: int,
    run: RunFolder,
    mailbox: Any,
    on_event: Callable[[Event], None],
) -> ray.train.Result:
    """Return an attempt's result; where Ray's own bookkeeping fails on storage, which it does not retry, try again."""
    for failures_left in range(max_failures, -1, -1):
        try:
            return _listening(attempt, mailbox, on_event)
        except (ray.train.TrainingFailedError, RayError, *STORAGE_ERRORS) as error:
            cause = getattr(error, "controller_failure", error)
            if isinstance(cause, TrainingStoppedError):
                raise cause from error
            if failures_left == 0 or not isinstance(cause, STORAGE_ERRORS):
                raise JobError(reason_of(error) + _saved(run)) from error
            on_event(WorkersLost(reason_of(error)))
            run.check_writable(retry=True)
    raise AssertionError("the last attempt returns or raises")


def _listening(
    work: Callable[[], ray.train.Result], mailbox: Any, on_event: Callable[[Event], None]
) -> ray.train.Result:
    """Return what ``work`` returns, done in a thread, so that this one hands on events and takes Ctrl-C.

    The first Ctrl-C lets the workers save what they have, where they are training. Raises KeyboardInterrupt then, too.
    """
    pool = ThreadPoolExecutor(1)
    result: Future[ray.train.Result] = pool.submit(work)
    try:
        with first_only_noted() as interrupted:
            _hand_on(result, mailbox, on_event, interrupted)
        if interrupted.is_set:
            raise KeyboardInterrupt
        return result.result()
    except RaySilentError:
        raise
    except BaseException:
        if not result.done():  # Ray must not be left while a thread waits for it
            with contextlib.suppress(RayError):
                end_controllers()
            wait([result], _END_TIMEOUT_S)
        raise
    finally:
        pool.shutdown(wait=False)


def _hand_on(
    result: Future[ray.train.Result], mailbox: Any, on_event: Callable[[Event], None], interrupted: Noted
) -> None:
    """Hand on events until there is a result, or for so long as the workers may take to save what they have."""
    is_training, end_at = False, math.inf
    pings: dict[str, Ping] = {}
    watch = Watch(pings)
    is_running = True
    while is_running and time.monotonic() < end_at:
        is_running = bool(wait([result], _POLL_INTERVAL_S).not_done)  # seen first: the last events are handed on too
        for event in _taken(mailbox):
            if isinstance(event, ControllerStarted):
                pings["Ray Train's controller"] = functools.partial(_ping, event.actor)
            is_training = isinstance(event, Started) or (is_training and not isinstance(event, WorkersLost))
            on_event(event)
        if interrupted.is_set and end_at == math.inf:
            end_at = time.monotonic() + (_SAVED_WITHIN_S if is_training else 0)
            if is_training:
                mailbox.want_stop.remote()
                on_event(Stopping())
        if silent := watch.silent():
            raise RaySilentError.of(silent)


def _ping(controller: Any) -> Future[object]:
    answer: Future[object] = controller.get_state.remote().future()
    return answer


def _taken(mailbox: Any) -> list[Event]:
    """Return the events that have come. Raises RaySilentError where the mailbox does not answer."""
    answer = mailbox.take.remote()
    if not ray.wait([answer], timeout=LONGEST_SILENCE_S)[0]:
        raise RaySilentError.of("the mailbox of its workers")
    events: list[Event] = ray.get(answer)
    return events


def drop_damaged_snapshot(run: RunFolder) -> None:
    """Remove Ray's list of a run's checkpoints where a kill has cut it off; workers look for checkpoints themselves."""

    def drop() -> None:
        if run.exists(private.SNAPSHOT_FILE) and snapshot_of(run) is None:
            run.delete_file(private.SNAPSHOT_FILE)

    with_retries(drop)


def _saved(run: RunFolder) -> str:
    try:
        names = run.checkpoint_names()
    except STORAGE_ERRORS:
        return ""
    return f"; last saved: {names[-1]}" if names else "; nothing was saved"
