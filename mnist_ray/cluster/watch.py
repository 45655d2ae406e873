"""Ends a job if Ray stops answering: the job would wait forever."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait

import ray

from mnist_ray import extras
from mnist_ray.errors import JobError, about_ray
from mnist_ray.process import in_thread
from mnist_ray.signals import end_with

MAX_SILENCE_S = 50.0  # a busy machine may need this long; after 60 s without the GCS, Ray ends this process silently
_LOOK_INTERVAL_S = 1.0
_STORED_BYTES = 2**18  # large enough for an object to go into the raylet's store


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


@contextlib.contextmanager
def watched(*, plain: bool = False) -> Iterator[Callable[[], None]]:
    """End the job with an error if Ray dies or hangs in the block. Yields a function that ends the watch.

    ``plain``: use only Ray's public API; it does not report at once that a part of Ray has died.
    """
    is_over, is_silent = threading.Event(), False

    def watch() -> None:
        while not is_over.wait(_LOOK_INTERVAL_S):
            try:
                look(plain=plain)
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
    """Raise what a signal handler raised while Ray's C++ ran, even if the C++ returned a result nevertheless."""
    try:
        yield
    except SystemError as error:
        raise error.__cause__ or error from None


def look(*, plain: bool = False) -> None:
    """Ask each part of Ray for a sign of life: an answer or an error. Raises RaySilentError if a part gives neither."""
    ask_gcs: Callable[[], object] = ray.nodes
    find_dead: Callable[[], list[str]] = list
    if extras.is_on("processes", plain=plain):
        from mnist_ray.extras import processes

        ask_gcs, find_dead = processes.remove_orphans, processes.dead_processes
    for name, ask in {"Ray's GCS": ask_gcs, "this node's raylet": lambda: ray.put(bytes(_STORED_BYTES))}.items():
        answer, end = in_thread(ask), time.monotonic() + MAX_SILENCE_S
        while True:
            if dead := find_dead():
                raise RaySilentError.of(f"its {dead[0]}", has_died=True)
            if wait([answer], _LOOK_INTERVAL_S).done:
                break
            if time.monotonic() > end:
                raise RaySilentError.of(name)
        if (error := answer.exception()) is not None and about_ray(error):
            raise error
