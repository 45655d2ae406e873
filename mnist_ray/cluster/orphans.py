"""Ray Train's controllers that are ended before their end, as that of a trial, and what Ray leaves of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import ray
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup

from mnist_ray.cluster import ray_internals

_INTERVAL_S = 0.5
_PATIENCE_S = 5.0  # with a Ray that may not answer any more
_NO_ACTOR = b"\xff" * 12  # how the id of an actor begins that is none; the rest is the job's


@contextlib.contextmanager
def orphans_removed() -> Iterator[None]:
    """Free meanwhile, twice a second, what dead actors of this job have reserved."""
    is_over = threading.Event()

    def remove_again_and_again() -> None:
        while not is_over.wait(_INTERVAL_S):
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
