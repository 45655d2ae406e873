"""Ray's private API, as far as a forked worker needs it and there is no public way."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import ray
import ray.actor
from ray._raylet import Config  # type: ignore[attr-defined]  # of Cython, some without stubs


@contextlib.contextmanager
def actor_ids_from_kernel() -> Iterator[None]:
    """Let actor classes that are defined meanwhile have ids of the kernel's generator.

    Ray's own is seeded at its first use: once used before a fork, all forks would go on with it, and draw the same.
    """

    class FromKernel:
        @staticmethod
        def from_random() -> ray.ActorClassID:
            return ray.ActorClassID(os.urandom(ray.ActorClassID.size()))

    own = ray.actor.ActorClassID
    ray.actor.ActorClassID = FromKernel
    try:
        yield
    finally:
        ray.actor.ActorClassID = own


def read_settings_again() -> None:
    """Read the settings in Ray's variables, which it reads when it is loaded, for a process that was forked later."""
    Config.initialize("")
