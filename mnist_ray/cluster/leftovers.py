"""What Ray leaves of a run whose controller was ended while Ray goes on, as that of a trial that was stopped."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import ray
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup

from mnist_ray import private

_INTERVAL_S = 0.5
_NO_ACTOR = b"\xff" * 12
"""How the id of an actor begins that is none; the rest is the job's."""


@contextlib.contextmanager
def leftovers_removed() -> Iterator[None]:
    """Free meanwhile, twice a second, what dead actors of this job have reserved."""
    is_over = threading.Event()

    def remove_again_and_again() -> None:
        while not is_over.wait(_INTERVAL_S):
            remove_leftover_placement_groups()

    thread = threading.Thread(target=remove_again_and_again, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def remove_leftover_placement_groups() -> None:
    """Free what dead actors of this job have reserved for their workers.

    Ray keeps a placement group until the actor that made it *and* its job have ended. Ray Train has an actor clean up
    behind a dead controller, which asks a dashboard about it; a local Ray has none.
    """
    job_id = bytes.fromhex(ray.get_runtime_context().get_job_id())
    for serialized in private.state._connect_and_get_accessor().get_placement_group_table():
        group = private.PlacementGroupTableData.FromString(serialized)
        is_there = group.state != private.PlacementGroupTableData.REMOVED
        is_drivers = group.creator_actor_id.startswith(_NO_ACTOR)
        if is_there and group.creator_actor_dead and not is_drivers and group.creator_job_id == job_id:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
