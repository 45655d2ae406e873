"""Whether Ray still answers, which a job would wait for for ever; and what Ray leaves behind of ended controllers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import ray
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup

from mnist_ray.cluster import ray_internals
from mnist_ray.errors import JobError
from mnist_ray.signals import end_with

Ping = Callable[[], "Future[object]"]
"""Asks for some sign of life; the future is done when it has come, be it an error."""

_INTERVAL_S = 1.0
_PING_INTERVAL_S = 5.0
_STORED_BYTES = 2**18  # so many that an object goes to the store, which is the raylet's
LONGEST_SILENCE_S = 50.0  # a machine may be very busy; after 60 s without its GCS, Ray ends the process without a word
_ORPHANS_INTERVAL_S = 0.5
_PATIENCE_S = 5.0  # with a Ray that may not answer any more
_NO_ACTOR = b"\xff" * 12  # how the id of an actor begins that is none; the rest is the job's


class RaySilentError(JobError):
    """A part of Ray has died or hangs; whatever else it is asked, it may not answer."""

    @classmethod
    def of(cls, name: str, *, has_died: bool = False) -> RaySilentError:
        """Return the error for a part of that name."""
        silence = "has died" if has_died else f"has not answered for {LONGEST_SILENCE_S:.0f} s"
        return cls(f"Ray has failed: {name} {silence}")


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


@contextlib.contextmanager
def watched() -> Iterator[Callable[[], None]]:
    """End the job with a RaySilentError where Ray dies or hangs meanwhile; give what ends the watch before."""
    pool, is_over, is_silent = ThreadPoolExecutor(2), threading.Event(), threading.Event()
    watch = Watch(
        {
            "Ray's GCS": lambda: pool.submit(ray.nodes),
            "this node's raylet": lambda: pool.submit(ray.put, bytes(_STORED_BYTES)),
        }
    )

    def look() -> None:
        while not is_over.wait(_INTERVAL_S):
            dead = ray_internals.global_worker.node.dead_processes()  # of a local Ray; those of a cluster are not ours
            silent = watch.silent()
            if dead or silent:
                is_silent.set()
                end_with(RaySilentError.of(silent or f"its {dead[0][0]}", has_died=bool(dead)))
                return

    thread = threading.Thread(target=look, daemon=True)

    def stop() -> None:
        is_over.set()
        thread.join()
        pool.shutdown(wait=not is_silent.is_set())  # Ray must not be left while a thread asks it

    thread.start()
    try:
        yield stop
    finally:
        stop()


@contextlib.contextmanager
def orphans_removed() -> Iterator[None]:
    """Free meanwhile, twice a second, what dead actors of this job have reserved."""
    is_over = threading.Event()

    def remove_again_and_again() -> None:
        while not is_over.wait(_ORPHANS_INTERVAL_S):
            remove_orphaned_placement_groups()

    thread = threading.Thread(target=remove_again_and_again, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(_PATIENCE_S)


def remove_orphaned_placement_groups() -> None:
    """Free what dead actors of this job have reserved for their workers.

    Ray keeps a placement group until the actor that made it *and* its job have ended. Ray Train has an actor clean up
    behind a dead controller, which asks a dashboard about it; a local Ray has none.
    """
    job_id = bytes.fromhex(ray.get_runtime_context().get_job_id())
    for serialized in ray_internals.state._connect_and_get_accessor().get_placement_group_table():
        group = ray_internals.PlacementGroupTableData.FromString(serialized)
        is_there = group.state != ray_internals.PlacementGroupTableData.REMOVED
        is_drivers = group.creator_actor_id.startswith(_NO_ACTOR)
        if is_there and group.creator_actor_dead and not is_drivers and group.creator_job_id == job_id:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def end_controllers() -> None:
    """End this job's controllers of Ray Train, so that threads of this process that wait for them go on.

    Ray is not to be shut down before: that may end this process by a SIGSEGV.
    """
    job_id = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    for actor_id, actor in ray_internals.state.actor_table(None, job_id).items():
        if actor["ActorClassName"] == "TrainController" and actor["State"] != "DEAD":
            ray_internals.global_worker.core_worker.kill_actor(ray.ActorID.from_hex(actor_id), True)
