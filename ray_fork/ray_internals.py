"""Uses of Ray's private API that forked workers need, because there is no public API for them.

If Ray lacks a name, only its use raises an ImportError or AttributeError: workers then start as usual.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
from collections.abc import Iterator

import ray
import ray.actor

from ray_fork.starting import SHIM, Forking

_PRESTART = "RAY_prestart_worker_first_driver"


@contextlib.contextmanager
def shim_in_local_ray(forking: Forking) -> Iterator[None]:
    """Let a local Ray that ``ray.init`` starts inside the block start workers through the shim, if there is a server.

    A runtime environment's ``py_executable`` would first import Ray. Workers that Ray starts before it knows the job
    cannot be forked, so this Ray starts none.
    """
    with contextlib.ExitStack() as at_the_end:
        if forking.server is not None:
            try:
                at_the_end.enter_context(_with_shim())
            except (ImportError, AttributeError) as error:
                logging.getLogger(__name__).warning("workers are started as usual, not forked: %s", error)
        yield


@contextlib.contextmanager
def _with_shim() -> Iterator[None]:
    from ray._private.parameter import RayParams

    rays_own = RayParams.__init__
    if "setup_worker_path" not in inspect.signature(rays_own).parameters:
        raise AttributeError("RayParams has no setup_worker_path")
    is_users_own = _PRESTART in os.environ
    os.environ.setdefault(_PRESTART, "0")
    RayParams.__init__ = functools.partialmethod(rays_own, setup_worker_path=str(SHIM))
    try:
        yield
    finally:
        RayParams.__init__ = rays_own
        if not is_users_own:
            del os.environ[_PRESTART]


@contextlib.contextmanager
def actor_ids_from_kernel() -> Iterator[None]:
    """Draw the ids of actor classes defined inside the block from the kernel's random generator.

    Ray seeds its own generator at the first use. If that came before a fork, all forks would draw equal ids.
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


def random_id() -> bytes:
    """Return an id from Ray's generator; this seeds the generator."""
    return ray.NodeID.from_random().binary()


def read_settings_again() -> None:
    """Read RAY_ variables again in a forked process: Ray reads them only when it is loaded."""
    from ray._raylet import Config  # type: ignore[attr-defined]  # Cython, partly without stubs

    Config.initialize("")
