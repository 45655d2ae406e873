"""Notices at once if a process of a local Ray dies, and frees what dead controllers of Ray Train have reserved.

Without it: a dead part of Ray is noticed only after ``MAX_SILENCE_S``. On a cluster, if Ray Train's controller is
killed, resources for workers may stay reserved until the job ends.
"""

from __future__ import annotations

import ray
from ray._private.state import state
from ray._private.worker import global_worker
from ray.core.generated.gcs_pb2 import ActorTableData, PlacementGroupTableData
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup

_NO_ACTOR = b"\xff" * 12  # the start of an actor id that means "none"; the job's id follows


def dead_processes() -> list[str]:
    """Return the dead essential parts of the local Ray that this process started."""
    return [name for name, _ in global_worker.node.dead_processes() if name in ("gcs_server", "raylet")]


def remove_orphans() -> None:
    """Free the resources that dead actors of this job have reserved for workers.

    Ray keeps a placement group until both its creator and the job have ended. To find dead controllers, Ray Train's own
    cleaner asks the dashboard; a local Ray has none.
    """
    for group in _orphaned_placement_groups():
        remove_placement_group(group)


def _orphaned_placement_groups() -> list[PlacementGroup]:
    """Return the placement groups of dead actors of this job; the public table does not name the actors.

    Only those that Ray has created: while it creates one, its removal may lose the resources.
    """
    job_id, orphans = bytes.fromhex(ray.get_runtime_context().get_job_id()), []
    for serialized in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(serialized)
        is_created = group.state == PlacementGroupTableData.CREATED
        is_drivers = group.creator_actor_id.startswith(_NO_ACTOR)
        if is_created and not is_drivers and group.creator_job_id == job_id and _has_died(group.creator_actor_id):
            orphans.append(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return orphans


def _has_died(actor_id: bytes) -> bool:
    """Return whether an actor has died. Its groups say so, too, but not one whose request was on its way then."""
    actor = state._connect_and_get_accessor().get_actor_info(ray.ActorID(actor_id))
    return actor is None or ActorTableData.FromString(actor).state == ActorTableData.DEAD
