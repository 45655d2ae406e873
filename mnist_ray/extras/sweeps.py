"""What Tune does otherwise during a sweep.

It cancels a request for resources only once Ray has reserved them: Ray 2.60 loses the CPUs of a placement group that is
removed while it is created, and Tune removes one if the trial takes over another trial's process meanwhile. Without it,
a sweep may lose CPUs, and its last training then waits for them.

It does not count the kinds of its callbacks for Ray's authors: for that, it would import W&B and MLflow if they are
installed, and W&B would leave folders in ``$TMPDIR``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import ray
from ray.air._internal import usage
from ray.util.placement_group import PlacementGroup, remove_placement_group

from mnist_ray.extras import replaced

_LOOK_EVERY_S = 1


@contextlib.contextmanager
def frugal() -> Iterator[None]:
    """Inside the block, Tune waits in a thread for a group that it cancels, and counts no callbacks."""
    with (
        replaced(ray.util, "remove_placement_group", _remove_once_created),
        replaced(usage, "tag_callbacks", lambda callbacks: False),
    ):
        yield


def _remove_once_created(group: PlacementGroup) -> None:
    threading.Thread(target=_remove, args=[group], daemon=True).start()


def _remove(group: PlacementGroup) -> None:
    with contextlib.suppress(Exception):  # Ray ends meanwhile, and the group with it
        while not group.wait(_LOOK_EVERY_S):
            pass
        remove_placement_group(group)
