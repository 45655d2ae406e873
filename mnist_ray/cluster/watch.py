"""Ends a job if Ray stops answering, because the job would wait forever. Cleans up after dead controllers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from typing import TypeVar

import ray
from ray.util import remove_placement_group

from mnist_ray.cluster import ray_internals
from mnist_ray.errors import JobError, about_ray
from mnist_ray.signals import end_with

T = TypeVar("T")
Ping = Callable[[], "Future[object]"]  # asks for a sign of life; the future is done when an answer, or an error, comes

LONGEST_SILENCE_S = 50.0  # a busy machine may need this long; after 60 s without its GCS, Ray ends the process silently
_LOOK_INTERVAL_S = 1.0
_PING_INTERVAL_S = 5.0
_STORED_BYTES = 2**18  # large enough for an object to go to the raylet's store
_ORPHANS_INTERVAL_S = 0.5
_STOP_TIMEOUT_S = 5.0  # a thread may wait for a Ray that has stopped answering


class RaySilentError(JobError):
    """A part of Ray has died or hangs. Other calls to Ray may hang as well."""

    @classmethod
    def of(cls, name: str, *, has_died: bool = False) -> RaySilentError:
        """Return the error for a part of Ray."""
        silence = "has died" if has_died else f"has not answered for {LONGEST_SILENCE_S:.0f} s"
        return cls(f"Ray has failed: {name} {silence}")


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


class Watch:
    """Pings parts of Ray regularly, and finds one that has stopped answering."""

    def __init__(self, pings: Mapping[str, Ping]) -> None:
        self._pings = pings
        self._asked: dict[str, tuple[float, Future[object]]] = {}

    def silent(self) -> str | None:
        """Return the name of a part that has been silent for too long, if any; ping the others when due."""
        now = time.monotonic()
        for name, ping in self._pings.items():
            asked_at, answer = self._asked.get(name, (-_PING_INTERVAL_S, None))
            if answer is not None and not answer.done():
                if now - asked_at > LONGEST_SILENCE_S:
                    return name
            elif now - asked_at >= _PING_INTERVAL_S:
                self._asked[name] = now, ping()
        return None

    def wait(self) -> None:
        """Wait for the answers to the last pings."""
        wait([answer for _, answer in self._asked.values()])


@contextlib.contextmanager
def watched() -> Iterator[Callable[[], None]]:
    """End the job with a RaySilentError if Ray dies or hangs in the block. Yields a function that ends the watch."""
    is_silent = threading.Event()
    watch = Watch(
        {
            "Ray's GCS": lambda: in_thread(ray.nodes),
            "this node's raylet": lambda: in_thread(lambda: ray.put(bytes(_STORED_BYTES))),
        }
    )

    def look() -> None:
        dead, silent = ray_internals.dead_processes(), watch.silent()
        if (dead or silent) and not is_silent.is_set():
            is_silent.set()
            end_with(RaySilentError.of(silent or f"its {dead[0]}", has_died=bool(dead)))

    def stop() -> None:
        stop_looking()
        if not is_silent.is_set():
            watch.wait()  # Ray must not be shut down while a thread waits for its answer

    with _repeated(look, _LOOK_INTERVAL_S) as stop_looking:
        try:
            yield stop
        finally:
            stop()


def remove_orphans() -> None:
    """Free the resources that dead actors of this job have reserved for workers.

    Ray keeps a placement group until the actor that made it *and* the job have ended. To find dead controllers, Ray
    Train's own cleaner asks a dashboard; a local Ray has none.
    """
    for group in ray_internals.orphaned_placement_groups():
        remove_placement_group(group)


def orphans_removed() -> AbstractContextManager[object]:
    """Call ``remove_orphans`` twice a second inside the block."""
    return _repeated(remove_orphans, _ORPHANS_INTERVAL_S)


@contextlib.contextmanager
def _repeated(action: Callable[[], None], interval_s: float) -> Iterator[Callable[[], None]]:
    """Repeat an action in a thread inside the block. Yields a function that stops it early."""
    is_over = threading.Event()

    def run() -> None:
        while not is_over.wait(interval_s):
            try:
                action()
            except Exception as error:
                if (said := about_ray(error)) is None:
                    raise
                end_with(JobError(said))
                return

    def stop(wait_s: float = _STOP_TIMEOUT_S) -> None:
        is_over.set()
        thread.join(wait_s)

    thread, wait_s = threading.Thread(target=run, daemon=True), _STOP_TIMEOUT_S
    thread.start()
    try:
        yield stop
    except RaySilentError:
        wait_s = 0.0  # the thread may wait for Ray, too
        raise
    finally:
        stop(wait_s)


def end_controllers() -> None:
    """End this job's controllers of Ray Train, so that threads of this process stop waiting for them.

    This must be done before ``ray.shutdown``, which may otherwise end the process with a SIGSEGV.
    """
    ray_internals.kill_actors("TrainController")
