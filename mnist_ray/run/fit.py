"""``fit`` trains a run with Ray Train's ``TorchTrainer``. The workers' events reach the driver through a queue."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from mnist_ray.cluster import train_internals
from mnist_ray.cluster.connect import Waiting, this_node
from mnist_ray.cluster.devices import usable
from mnist_ray.cluster.plan import WorkerPlan, plan_workers
from mnist_ray.cluster.remote_data import share
from mnist_ray.cluster.rendezvous import WorkerGroupConfig
from mnist_ray.cluster.watch import MAX_SILENCE_S, RaySilentError, as_raised, controllers, end_controllers, in_thread
from mnist_ray.errors import JobError, TrainingStoppedError
from mnist_ray.run import evaluate
from mnist_ray.run.failures import FailureCallback, OldCheckpointError, cause_of, reason_of
from mnist_ray.run.find import NUM_KEPT, Fitted, best_of, drop_others
from mnist_ray.run.reporter import Outcome, train_loop_per_worker
from mnist_ray.run.session import Session
from mnist_ray.run.worker import LoopSpec
from mnist_ray.signals import Noted, first_only_noted
from mnist_ray.storage import SNAPSHOT_FILE, STORAGE_ERRORS, RunFolder, in_one_line, with_retries
from mnist_ray.training.events import ControllerAlive, Event, Note, Started, Stopping, WorkerAlive, WorkersLost

_POLL_INTERVAL_S = 0.5  # between the driver's requests for events; workers send their progress at the same interval
_START_INTERVAL_S = 0.1  # the same, while no workers train
_STOP_TIMEOUT_S = 60.0  # after Ctrl-C, for a step or any other sign of life of the workers
_END_TIMEOUT_S = 5.0  # to wait for the end of Ray Train's controller, if the run ends first
_ALIVE_INTERVAL_S = 5.0  # between two signs of life of the controller's process
_RESIZE_INTERVAL_S = 15.0  # after which an elastic run checks again whether the cluster has room for more workers


def plan(session: Session) -> WorkerPlan:
    """Return how many workers train, and on what. Raises UsageError; UnusableGPUError without Ray."""
    use_gpu, chunks = session.workers.use_gpu, session.job.train.reproducible_chunks
    if not session.is_here:
        return plan_workers(session.workers, session.cluster, chunks)
    is_on_gpu = use_gpu == "yes" or (use_gpu == "auto" and chunks is None and torch.cuda.is_available())
    if is_on_gpu:
        usable(torch.device("cuda"))
    return WorkerPlan(0, 0, is_on_gpu, must_scale_up=False)


def fit(session: Session, plan: WorkerPlan, on_event: Callable[[Event], None]) -> Fitted:
    """Train on Ray, from the last checkpoint if there is one; pass on events; return the checkpoint to test.

    Raises TrainingStoppedError if a retry would fail too; otherwise JobError. After Ctrl-C, KeyboardInterrupt.
    """
    job, validation = session.job, session.data.validation
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(job.workers.hang_timeout_s))
    if plan.min_workers is not None:  # how long Ray waits to replace a lost node's workers before it runs fewer
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    if not plan.use_gpu:
        evaluate.start_process()
    event_queue = open_event_queue()  # its process starts while the data are shared
    spec = LoopSpec(
        job=job,
        train=share(job.workload, session.data.train),
        validation=share(job.workload, validation) if len(validation) else None,
        event_queue=event_queue,
        is_local=plan.is_local,
    )
    outcome = fit_again(spec, plan, on_event)
    if outcome.diverged is not None:
        raise outcome.diverged
    if outcome.is_stopped:  # after Ctrl-C, fit_and_listen has raised KeyboardInterrupt
        raise JobError("a callback has stopped the training")
    with in_one_line("the storage has failed"):
        drop_others(job)  # Ray does not know the checkpoints from before a resume
        return best_of(job.run)


def fit_again(spec: LoopSpec, plan: WorkerPlan, on_event: Callable[[Event], None]) -> Outcome:
    """Fit, and fit again if the storage fails or a checkpoint is damaged. Ray itself replaces workers that are lost.

    Both count as failures of the run: Ray's are known by the event ``WorkersLost``. Raises like ``fit``.
    """
    failures_left, run = spec.job.workers.max_failures, spec.job.run

    def pass_on(event: Event) -> None:
        nonlocal failures_left
        if isinstance(event, WorkersLost) and event.is_failure:
            failures_left -= 1
        on_event(event)

    while True:
        try:
            drop_rays_list(run)
            trainer = create_trainer(spec, plan, failures_left, [FailureCallback(spec.event_queue)])
            outcome: Outcome = fit_and_listen(trainer, spec.event_queue, pass_on).return_value
            return outcome
        except (ray.train.TrainingFailedError, RayError, *STORAGE_ERRORS) as error:
            cause = cause_of(error)
            if isinstance(cause, TrainingStoppedError):
                raise cause from error
            # The storage has failed during Ray's own bookkeeping, or Ray has to forget a checkpoint.
            if failures_left <= 0 or not isinstance(cause, (*STORAGE_ERRORS, OldCheckpointError)):
                raise JobError(reason_of(error)) from error
            pass_on(WorkersLost(reason_of(error)))
            run.check_writable(retry=True)


def fit_and_listen(trainer: TorchTrainer, event_queue: Any, on_event: Callable[[Event], None]) -> ray.train.Result:
    """Fit in another thread, while this thread passes on events and handles Ctrl-C; return the result.

    At the first Ctrl-C, workers that are training, and do not hang, save a checkpoint; then this raises
    KeyboardInterrupt.
    """
    end_own = functools.partial(end_controllers, but=controllers())  # the caller may train with Ray Train, too
    result = in_thread(trainer.fit)
    try:
        with first_only_noted() as interrupted:
            _listen(result, event_queue, on_event, interrupted, end_own)
        if interrupted.is_set:
            raise KeyboardInterrupt
        return result.result()
    except RaySilentError:
        raise
    except BaseException:
        if not result.done():  # do not disconnect from Ray while a thread waits for it
            with contextlib.suppress(RayError):
                end_own()
            wait([result], _END_TIMEOUT_S)
        raise


def _listen(
    result: Future[ray.train.Result],
    event_queue: Any,
    on_event: Callable[[Event], None],
    interrupted: Noted,
    end_controller: Callable[[], None],
) -> None:
    """Pass on events until there is a result or, after Ctrl-C, until no workers are training, or they hang."""
    is_running, is_training, stopping_at = True, False, math.inf
    alive_at = math.inf  # unknown until the controller has started
    told_at = lived_at = -math.inf  # of the workers: when one last told how it is, and when one last showed life
    waiting = Waiting("the workers", lambda text: on_event(Note(text)))
    while is_running and (is_training or not interrupted.is_set):
        interval = _POLL_INTERVAL_S if is_training else _START_INTERVAL_S
        is_running = bool(wait([result], interval).not_done)  # checked before the last events are taken
        taken = _taken(event_queue)
        events = [event for event in taken if not isinstance(event, ControllerAlive)]
        if len(events) < len(taken):
            alive_at = time.monotonic()
        elif time.monotonic() - alive_at > MAX_SILENCE_S:
            with contextlib.suppress(RayError):
                end_controller()  # else it could go on to train, once it answers again
            raise RaySilentError.of("Ray Train's controller")
        for event in events:
            if isinstance(event, WorkerAlive):
                told_at = time.monotonic()
                lived_at = max(lived_at, told_at - event.silent_s)
                continue
            is_training = isinstance(event, Started) or (is_training and not isinstance(event, WorkersLost))
            on_event(event)  # may take long, if the terminal or the storage does
        waiting.look(is_waiting=not is_training and time.monotonic() - told_at > 2 * _ALIVE_INTERVAL_S)
        if interrupted.is_set and is_training and stopping_at == math.inf:
            stopping_at = time.monotonic()
            event_queue.want_stop.remote()
            on_event(Stopping())
        if time.monotonic() - max(stopping_at, lived_at) > _STOP_TIMEOUT_S:
            on_event(Note(f"no checkpoint is saved: no worker has made progress for {_STOP_TIMEOUT_S:.0f} s"))
            return


def _taken(event_queue: Any) -> list[Event]:
    """Return the new events. Raises RaySilentError if the event queue does not answer."""
    answer = event_queue.take.remote()
    with as_raised():
        if not ray.wait([answer], timeout=MAX_SILENCE_S)[0]:
            raise RaySilentError.of("the event queue of its workers")
        return ray.get(answer)


def drop_rays_list(run: RunFolder) -> None:
    """Remove Ray's list of a run's checkpoints, which a kill may have cut off: workers find checkpoints without it."""
    with_retries(lambda: run.delete_file(SNAPSHOT_FILE) if run.exists(SNAPSHOT_FILE) else None)


def create_trainer(
    spec: LoopSpec, plan: WorkerPlan, max_failures: int, callbacks: Sequence[UserCallback] = ()
) -> TorchTrainer:
    """Return the trainer that runs ``spec`` on the planned workers."""
    return _Trainer(
        train_loop_per_worker,
        train_loop_config={"spec": spec},
        torch_config=WorkerGroupConfig(is_local=plan.is_local),
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers if plan.min_workers is None else (plan.min_workers, plan.num_workers),
            elastic_resize_monitor_interval_s=_RESIZE_INTERVAL_S,
            placement_strategy=plan.placement,
            use_gpu=plan.use_gpu,
            resources_per_worker={"CPU": plan.cpus_per_worker, **({"GPU": 1} if plan.use_gpu else {})},
            label_selector=dict(plan.labels),
        ),
        run_config=RunConfig(
            name=spec.job.run.name,
            storage_path=spec.job.run.storage_path,
            checkpoint_config=CheckpointConfig(
                num_to_keep=NUM_KEPT,  # the best; Ray keeps the last, too
                checkpoint_score_attribute=None if spec.validation is None else "val_score",
            ),
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=list(callbacks),
        ),
    )


class _Trainer(TorchTrainer):
    """A trainer without Ray's unneeded actors: each actor is a process, which takes time to start and end."""

    def _create_default_callbacks(self) -> list[Any]:
        unneeded: tuple[type, ...] = (train_internals.DatasetsCallback,)  # there are no Ray Datasets
        if self.backend_config.is_local:  # nothing to clean up: a local Ray ends with the job
            unneeded += (train_internals.PlacementGroupCleanerCallback,)
        callbacks = super()._create_default_callbacks()
        needed = [callback for callback in callbacks if not isinstance(callback, unneeded)]
        return [*needed, _OnController(self.train_loop_config["spec"].event_queue)]


class _OnController(train_internals.ControllerCallback):
    """Lets the driver know that the controller's process is alive, and sets this process up."""

    def __init__(self, event_queue: Any) -> None:
        self._event_queue = event_queue

    def after_controller_start(self, train_run_context: object) -> None:
        # Checkpoints within an epoch have no score.
        scorer = logging.getLogger("ray.train._internal.checkpoint_manager")
        scorer.addFilter(lambda record: "no key: val_score" not in record.getMessage())
        if self._event_queue is not None:
            threading.Thread(target=self._show_life, daemon=True).start()

    def after_controller_state_update(self, previous_state: object, current_state: object) -> None:
        """Report workers that are replaced because their node is to leave: there is no exception to tell of them."""
        states = (train_internals.PreemptingState, train_internals.RestartingState)
        if self._event_queue is not None and all(map(isinstance, (previous_state, current_state), states)):
            self._event_queue.put.remote(WorkersLost("a worker's node was preempted", is_failure=False))

    def _show_life(self) -> None:
        """Send signs of life. The controller itself answers nothing while it waits for nodes or for its workers."""
        while True:
            self._event_queue.put.remote(ControllerAlive())
            time.sleep(_ALIVE_INTERVAL_S)


class EventQueue:
    """Keeps events until the driver takes them; an actor, so that neither side waits for the other."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._is_stop_wanted = False

    def put(self, event: Event) -> bool:
        """Keep an event; return whether the training must stop."""
        self._events.append(event)
        return self._is_stop_wanted

    def take(self) -> list[Event]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    def want_stop(self) -> None:
        """From now on, let ``put`` return that training must stop."""
        self._is_stop_wanted = True


def open_event_queue() -> Any:
    """Create an event queue on this node, so that it is not lost with another node; return its actor."""
    return ray.remote(num_cpus=0, scheduling_strategy=this_node())(EventQueue).remote()
