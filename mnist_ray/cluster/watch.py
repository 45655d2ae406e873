"""Whether Ray still answers: what a job waits for may have died or hang, and Ray itself would wait for ever."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import ray

from mnist_ray import private
from mnist_ray.errors import JobError
from mnist_ray.interrupts import end_with

Ping = Callable[[], "Future[object]"]
"""Asks for some sign of life; the future is done when it has come, be it an error."""

_INTERVAL_S = 1.0
_PING_INTERVAL_S = 5.0
LONGEST_SILENCE_S = 50.0  # a machine may be very busy; after 60 s without its GCS, Ray ends the process without a word


class Watch:
    """Pings in turns, and finds who has not answered for long."""

    def __init__(self, pings: Mapping[str, Ping], longest_silence_s: float = LONGEST_SILENCE_S) -> None:
        self._pings = pings
        self._longest_silence_s = longest_silence_s
        self._asked: dict[str, tuple[float, Future[object]]] = {}

    def silent(self) -> str | None:
        """Return who has been silent for too long, if anybody has; ping those whose turn it is."""
        now = time.monotonic()
        for name, ping in self._pings.items():
            asked_at, answer = self._asked.get(name, (-_PING_INTERVAL_S, None))
            if answer is not None and not answer.done():
                if now - asked_at > self._longest_silence_s:
                    return name
            elif now - asked_at >= _PING_INTERVAL_S:
                self._asked[name] = now, ping()
        return None


def no_answer_from(name: str) -> str:
    """Say that somebody has been silent for too long."""
    return f"Ray has failed: {name} has not answered for {LONGEST_SILENCE_S:.0f} s"


@contextlib.contextmanager
def watched(answers_here: Callable[[], ray.ObjectRef]) -> Iterator[None]:
    """End the job with a JobError where Ray dies or hangs meanwhile.

    ``answers_here`` starts a task on this node that does nothing.
    """
    pool, is_over = ThreadPoolExecutor(2), threading.Event()  # also to ask may wait
    watch = Watch(
        {
            "Ray's GCS": lambda: pool.submit(ray.nodes),
            "this node's raylet": lambda: pool.submit(lambda: ray.get(answers_here())),
        }
    )

    def look() -> None:
        while not is_over.wait(_INTERVAL_S):
            if dead := private.global_worker.node.dead_processes():  # of a local Ray; those of a cluster are not ours
                end_with(JobError(f"Ray has failed: its {dead[0][0]} has died"))
                return
            if name := watch.silent():
                end_with(JobError(no_answer_from(name)))
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        pool.shutdown(wait=False, cancel_futures=True)
