"""Ends a job if Ray stops answering: the job would wait forever."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
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

    @classmethod
    def of(cls, name: str) -> RaySilentError:
        """Return the error for a part of Ray that hangs."""
        return cls(f"Ray has failed: {name} has not answered for {MAX_SILENCE_S:.0f} s")


class Watch:
    """A thread that ends the job with an error if Ray dies or hangs, until it is stopped.

    ``plain``: use only Ray's public API; it does not report at once that a part of Ray has died.
    """

    def __init__(self, *, plain: bool) -> None:
        self._plain, self._is_over = plain, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to watch. The thread is a daemon: it may wait forever for a Ray that hangs."""
        self._thread.start()

    def stop(self, *, is_silent: bool = False) -> None:
        """Stop, once Ray has answered: it must not be shut down while a thread waits. A silent Ray never answers."""
        self._is_over.set()
        if self._thread.is_alive() and not is_silent:
            self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(_LOOK_INTERVAL_S):
            try:
                look(plain=self._plain)
            except Exception as error:
                said = about_ray(error)
                end_with(JobError(said) if said else error)
                return


@contextlib.contextmanager
def as_raised() -> Iterator[None]:
    """Raise what a signal handler raised while Ray's C++ ran, even if the C++ returned a result nevertheless."""
    try:
        yield
    except SystemError as error:
        raise error.__cause__ or error from None


def look(*, plain: bool) -> None:
    """Ask Ray's GCS and this node's raylet for a sign of life: an answer or an error.

    Raises RaySilentError if there is neither, or a process of a local Ray has died.
    """
    processes = extras.load("processes", plain=plain)

    def ask() -> None:
        if processes:
            processes.remove_orphans()  # asks the GCS
        else:
            ray.nodes()
        ray.put(bytes(_STORED_BYTES))

    answer = in_thread(ask)
    end = time.monotonic() + MAX_SILENCE_S
    has_answered = False
    while not has_answered:
        if processes and (dead := processes.dead_processes()):
            raise RaySilentError(f"Ray has failed: its {dead[0]} has died")
        has_answered = bool(wait([answer], _LOOK_INTERVAL_S).done)
        if not has_answered and time.monotonic() > end:
            raise RaySilentError.of("its GCS, or this node's raylet,")
    if (error := answer.exception()) is not None and about_ray(error):
        raise error
