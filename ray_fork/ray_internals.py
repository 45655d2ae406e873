"""The private API of Ray that a forked worker needs, because there is no public one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import ray
import ray.actor
from ray._raylet import Config  # type: ignore[attr-defined]  # of Cython, some without stubs


@contextlib.contextmanager
def actor_ids_from_kernel() -> Iterator[None]:
    """Draw the ids of actor classes that are defined inside the block from the kernel's generator.

    Ray seeds its own generator at the first use. If that happened before a fork, all forks would draw the same ids.
    """

    class FromKernel:
        @staticmethod
        def from_random() -> ray.ActorClassID:
            return ray.ActorClassID(os.urandom(ray.ActorClassID.size()))

    rays_own = ray.actor.ActorClassID
    ray.actor.ActorClassID = FromKernel
    try:
        yield
    finally:
        ray.actor.ActorClassID = rays_own


def read_settings_again() -> None:
    """Read RAY_ variables again in a forked process: Ray reads them only when it is loaded."""
    Config.initialize("")
