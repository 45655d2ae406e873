"""Whether Ray still answers, which a job would wait for for ever; and what Ray leaves behind of ended controllers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import ray
from ray.util import remove_placement_group

from mnist_ray.cluster import ray_internals
from mnist_ray.errors import JobError
from mnist_ray.signals import end_with

Ping = Callable[[], "Future[object]"]
"""Asks for some sign of life; the future is done when it has come, be it an error."""

LONGEST_SILENCE_S = 50.0  # a machine may be very busy; after 60 s without its GCS, Ray ends the process without a word
_LOOK_INTERVAL_S = 1.0
_PING_INTERVAL_S = 5.0
_STORED_BYTES = 2**18  # so many that an object goes to the store, which is the raylet's
_ORPHANS_INTERVAL_S = 0.5
_PATIENCE_S = 5.0  # with a Ray that may not answer any more


class RaySilentError(JobError):
    """A part of Ray has died or hangs; whatever else it is asked, it may not answer."""

    @classmethod
    def of(cls, name: str, *, has_died: bool = False) -> RaySilentError:
        """Return the error for a part of that name."""
        silence = "has died" if has_died else f"has not answered for {LONGEST_SILENCE_S:.0f} s"
        return cls(f"Ray has failed: {name} {silence}")


class Watch:
    """Pings in turns, and finds who has not answered for long."""

    def __init__(self, pings: Mapping[str, Ping]) -> None:
        self._pings = pings
        self._asked: dict[str, tuple[float, Future[object]]] = {}

    def silent(self) -> str | None:
        """Return who has been silent for too long, if anybody has; ping those whose turn it is."""
        now = time.monotonic()
        for name, ping in self._pings.items():
            asked_at, answer = self._asked.get(name, (-_PING_INTERVAL_S, None))
            if answer is not None and not answer.done():
                if now - asked_at > LONGEST_SILENCE_S:
                    return name
            elif now - asked_at >= _PING_INTERVAL_S:
                self._asked[name] = now, ping()
        return None


@contextlib.contextmanager
def watched() -> Iterator[Callable[[], None]]:
    """End the job with a RaySilentError if Ray dies or hangs meanwhile; give what ends the watch before."""
    pool, is_silent = ThreadPoolExecutor(2), threading.Event()
    watch = Watch(
        {
            "Ray's GCS": lambda: pool.submit(ray.nodes),
            "this node's raylet": lambda: pool.submit(ray.put, bytes(_STORED_BYTES)),
        }
    )

    def look() -> None:
        dead, silent = ray_internals.dead_processes(), watch.silent()
        if (dead or silent) and not is_silent.is_set():
            is_silent.set()
            end_with(RaySilentError.of(silent or f"its {dead[0]}", has_died=bool(dead)))

    def stop() -> None:
        stop_looking()
        pool.shutdown(wait=not is_silent.is_set())  # Ray must not be left while a thread asks it

    stop_looking = _repeat(look, _LOOK_INTERVAL_S)
    try:
        yield stop
    finally:
        stop()


@contextlib.contextmanager
def orphans_removed() -> Iterator[None]:
    """Free meanwhile, twice a second, what dead actors of this job have reserved for their workers.

    Ray keeps a placement group until the actor that made it *and* its job have ended. Ray Train has an actor clean up
    behind a dead controller, which asks a dashboard about it; a local Ray has none.
    """

    def remove() -> None:
        for group in ray_internals.orphaned_placement_groups():
            remove_placement_group(group)

    stop = _repeat(remove, _ORPHANS_INTERVAL_S)
    try:
        yield
    finally:
        stop(_PATIENCE_S)


def _repeat(action: Callable[[], None], interval_s: float) -> Callable[..., None]:
    """Do something again and again in a thread; return what ends that, and waits for its end for some seconds."""
    is_over = threading.Event()

    def run() -> None:
        while not is_over.wait(interval_s):
            action()

    def stop(timeout_s: float | None = None) -> None:
        is_over.set()
        thread.join(timeout_s)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return stop


def end_controllers() -> None:
    """End this job's controllers of Ray Train, so that threads of this process that wait for them go on.

    Ray is not to be shut down before: that may end this process by a SIGSEGV.
    """
    ray_internals.kill_actors("TrainController")
