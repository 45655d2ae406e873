"""Separates failures that a retry may avoid from bugs, and describes a failure in one line."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError
from ray.train import UserCallback

from mnist_ray.errors import ExampleError, JobError, TrainingStoppedError, UnreadableDataError, first_line, with_place
from mnist_ray.storage import STORAGE_ERRORS
from mnist_ray.training.events import ControllerAlive, WorkersLost
from mnist_ray.training.state import StopWantedError

_PASSING = (*STORAGE_ERRORS, JobError, MemoryError, torch.OutOfMemoryError)
_CUDA_BUGS = (35, 209, 710)  # the driver is too old, PyTorch has no kernels for this GPU, a kernel's assertion failed
# PyTorch also raises plain RuntimeErrors for failures of the hardware and for killed loader processes.
_PASSING_TEXTS = ("CUDA error", "cuDNN error", "DataLoader worker")
_ALIVE_INTERVAL_S = 5.0  # between two signs of life of the controller's process


@contextlib.contextmanager
def code_failures_placed(*folders: Path) -> Iterator[None]:
    """Raise the code's exceptions, even ``sys.exit()``, as a TrainingStoppedError with the place in ``folders``."""
    try:
        yield
    except (TrainingStoppedError, StopWantedError):
        raise
    except BaseException as error:
        if isinstance(error, torch.OutOfMemoryError):  # may pass: the memory of a dead worker may not be free yet
            fix = "lower --micro-batch-size or --batch-size, or override the workload's evaluation_batch_size"
            raise JobError(first_line(error), fix=fix) from error
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        is_of_ray = frame.f_code.co_filename.startswith((*ray.__path__, "python/ray/"))  # to end a process or a trial
        if may_pass(error) or (is_of_ray and not isinstance(error, Exception)):
            raise
        kind = UnreadableDataError if isinstance(error, ExampleError) else TrainingStoppedError
        raise kind(with_place(error, *folders)) from error


def may_pass(error: BaseException) -> bool:
    """Return whether a retry may avoid an error. Other errors are bugs in the training's code."""
    if getattr(error, "error_code", None) in _CUDA_BUGS:
        return False
    is_of_ray = type(error).__module__.partition(".")[0] == "ray"
    return isinstance(error, _PASSING) or is_of_ray or is_of_group(error) or str(error).startswith(_PASSING_TEXTS)


def is_of_group(error: BaseException) -> bool:
    """Return whether workers could not communicate; gloo may raise a plain RuntimeError for this."""
    is_of_gloo = isinstance(error, RuntimeError) and re.search(r"\bgloo\b", str(error), re.IGNORECASE) is not None
    return is_of_gloo or isinstance(error, torch.distributed.DistError)


class FailureCallback(UserCallback):
    """Reports to the driver's event queue why workers are replaced, or ends the run if its code has failed.

    Ray calls it in the process of Ray Train's controller. There, it also shows that this process is alive: the
    controller itself does not answer while it waits for nodes or workers.
    """

    def __init__(self, event_queue: Any, *, is_with_controller: bool = False) -> None:
        self._event_queue, self._is_with_controller = event_queue, is_with_controller
        if is_with_controller:
            threading.Thread(target=self._show_life, daemon=True).start()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._is_with_controller:
            return UserCallback, ()  # for the workers, which do not call it
        return functools.partial(FailureCallback, is_with_controller=True), (self._event_queue,)

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Handle the exceptions of the failed ranks."""
        for error in worker_exceptions.values():
            if isinstance(error, TrainingStoppedError):
                raise error  # to Ray, this is an error of its own controller, so it does not retry
        self._event_queue.put.remote(WorkersLost(describe(worker_exceptions)))

    def _show_life(self) -> None:
        controller = ray.get_runtime_context().current_actor
        while True:
            self._event_queue.put.remote(ControllerAlive(controller))
            time.sleep(_ALIVE_INTERVAL_S)


def describe(worker_exceptions: Mapping[int, Exception]) -> str:
    """Describe one failed rank in one line, preferably one that died: its death makes the other workers fail too."""
    # If Ray Train's health check of a worker failed, the reason is inside the error.
    own = {rank: getattr(error, "health_check_failure", error) for rank, error in worker_exceptions.items()}
    rank, error = min(own.items(), key=lambda item: (not isinstance(item[1], RayActorError), item[0]))
    cause = getattr(error, "_base_exc", error)
    if is_of_group(cause):
        return f"worker {rank} has lost its connection to another worker, which has died or hangs"
    if not isinstance(error, RayActorError):
        return f"worker {rank} failed: {_line_of(cause)}"
    if error.preempted:
        return f"worker {rank} was lost with its node, which was preempted"
    return f"worker {rank} died: it hung, was killed (perhaps for lack of memory), lost its node, or called os._exit"


def error_of(failed: Exception, last_loss: str = "") -> JobError:
    """Return the error of a run whose training failed; if a worker failed, ``last_loss`` may describe it better."""
    if failures := getattr(failed, "worker_failures", None):
        return JobError(last_loss or describe(failures))
    cause: Exception = getattr(failed, "controller_failure", failed)
    cause = getattr(cause, "cause", cause)  # if it is a RayTaskError, whose own text is a traceback
    if isinstance(cause, TrainingStoppedError):
        return cause
    return JobError(first_line(cause) if isinstance(cause, JobError) else f"Ray Train failed: {_line_of(cause)}")


def _line_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error) if str(error).strip() else 'no message'}"
