"""Uses of Ray's private API that forked workers need, because there is no public API for them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import ray
import ray.actor
from ray._raylet import Config  # type: ignore[attr-defined]  # Cython, partly without stubs


@contextlib.contextmanager
def actor_ids_from_kernel() -> Iterator[None]:
    """Take the ids of actor classes that are defined inside the block from the kernel's random generator.

    Ray seeds its own generator at the first use. If the first use came before a fork, all forks would get equal ids.
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
