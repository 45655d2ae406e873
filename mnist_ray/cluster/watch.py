"""Ends a job if Ray stops answering, because the job would wait forever. Cleans up after dead controllers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

import ray
from ray.util import remove_placement_group

from mnist_ray.cluster import ray_internals
from mnist_ray.errors import JobError, about_ray
from mnist_ray.signals import end_with

T = TypeVar("T")

MAX_SILENCE_S = 50.0  # a busy machine may need this long; after 60 s without its GCS, Ray ends the process silently
_LOOK_INTERVAL_S = 1.0
_STORED_BYTES = 2**18  # large enough for an object to go to the raylet's store


class RaySilentError(JobError):
    """A part of Ray has died or hangs. Other calls to Ray may hang as well."""

    has_died = False  # else it hangs

    @classmethod
    def of(cls, name: str, *, has_died: bool = False) -> RaySilentError:
        """Return the error for a part of Ray."""
        silence = "has died" if has_died else f"has not answered for {MAX_SILENCE_S:.0f} s"
        error = cls(f"Ray has failed: {name} {silence}")
        error.has_died = has_died
        return error


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Call a function in a thread for which Python does not wait when it exits: it may wait for a silent Ray."""
    result: Future[T] = Future()

    def call() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return result


@contextlib.contextmanager
def watched() -> Iterator[Callable[[], None]]:
    """End the job with an error if Ray dies or hangs in the block. Yields a function that ends the watch."""
    is_over, is_silent = threading.Event(), False

    def watch() -> None:
        while not is_over.wait(_LOOK_INTERVAL_S):
            try:
                look()
            except Exception as error:
                said = about_ray(error)
                end_with(JobError(said) if said else error)
                return

    def stop() -> None:
        is_over.set()
        if not is_silent:
            thread.join()  # Ray must not be shut down while a thread waits for its answer

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        with as_raised():
            yield stop
    except RaySilentError:
        is_silent = True
        raise
    finally:
        stop()


@contextlib.contextmanager
def as_raised() -> Iterator[None]:
    """Raise what a signal's handler has raised while Ray's C++ ran, even if that has returned a result all the same."""
    try:
        yield
    except SystemError as error:
        raise error.__cause__ or error from None


def look() -> None:
    """Ask each part of Ray for a sign of life: an answer, or an error. Raises RaySilentError if a part gives none."""
    parts = {"Ray's GCS": remove_orphans, "this node's raylet": lambda: ray.put(bytes(_STORED_BYTES))}
    for name, ask in parts.items():
        answer, end = in_thread(ask), time.monotonic() + MAX_SILENCE_S
        while True:
            if dead := ray_internals.dead_processes():
                raise RaySilentError.of(f"its {dead[0]}", has_died=True)
            if wait([answer], _LOOK_INTERVAL_S).done:
                break
            if time.monotonic() > end:
                raise RaySilentError.of(name)
        if (error := answer.exception()) is not None and about_ray(error):
            raise error


def remove_orphans() -> None:
    """Free the resources that dead actors of this job have reserved for workers.

    Ray keeps a placement group until the actor that made it *and* the job have ended. To find dead controllers, Ray
    Train's own cleaner asks a dashboard; a local Ray has none.
    """
    for group in ray_internals.orphaned_placement_groups():
        remove_placement_group(group)


def controllers() -> set[str]:
    """Return the ids of Ray Train's controllers that this process has started."""
    return ray_internals.actors_of("TrainController")


def end_controllers(but: Collection[str] = ()) -> None:
    """End this process's controllers of Ray Train, ``but`` others, so that its threads stop waiting for them.

    This must be done before ``ray.shutdown``, which may otherwise end the process with a SIGSEGV.
    """
    for controller in controllers().difference(but):
        ray_internals.kill_actor(controller)
