"""Lets Tune cancel a request for resources only once Ray has reserved them.

Ray 2.60 loses the CPUs of a placement group that is removed while it is created. Tune removes one if the trial takes
over another trial's process meanwhile. Without it: a sweep may lose CPUs, and its last training then waits for them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from mnist_ray.extras.replaced import replaced

_LOOK_EVERY_S = 1


@contextlib.contextmanager
def cancelled_once_created() -> Iterator[None]:
    """Inside the block, ``ray.util.remove_placement_group``, by which Tune cancels, waits for a group in a thread."""
    with replaced(ray.util, "remove_placement_group", _remove_once_created):
        yield


def _remove_once_created(group: PlacementGroup) -> None:
    threading.Thread(target=_remove, args=[group], daemon=True).start()


def _remove(group: PlacementGroup) -> None:
    with contextlib.suppress(Exception):  # Ray ends meanwhile, and the group with it
        while not group.wait(_LOOK_EVERY_S):
            pass
        remove_placement_group(group)
