"""A Ray of this job's own on this machine, as small as one job needs it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import shutil
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import ray

from mnist_ray.cluster import ray_internals
from mnist_ray.cluster.environment import for_workers, prepare_local
from mnist_ray.cluster.forking.starting import SHIM, Forking
from mnist_ray.errors import UsageError

_MOST_BYTES_OF_A_SOCKET = 103 if sys.platform == "darwin" else 107


def start_local(
    num_cpus: int,
    forking: Forking | None,
    session: Path,
    *,
    log_to_driver: bool,
    has_dashboard: bool = False,
    **options: Any,
) -> None:
    """Start a Ray that listens on loopback only, and keeps its files in a new session's folder, and connect to it."""
    prepare_local()
    for_job = for_one_job(forking, log_to_driver=log_to_driver, session_name=session.name, has_dashboard=has_dashboard)
    with _on_loopback(), for_job:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=has_dashboard,
            log_to_driver=log_to_driver,
            runtime_env={"env_vars": for_workers()},
            _temp_dir=str(session.parent),
            **options,
        )


def new_session() -> Path:
    """Return the folder where a local Ray of this process can keep its files, named as Ray does it.

    Raises UsageError where it could not.
    """
    name = f"session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}"
    session = Path(ray_internals.get_default_ray_temp_dir(), name).absolute()
    advice = "set RAY_TMPDIR to another folder"
    if len(os.fsencode(session / "sockets" / "plasma_store")) > _MOST_BYTES_OF_A_SOCKET:
        raise UsageError(f"{session.parent} is too long a path for the sockets of a local Ray; {advice}")
    try:
        session.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"a local Ray cannot keep files in {session.parent}: {error.strerror}; {advice}") from error
    return session


@contextlib.contextmanager
def removed_unless_failed(session: Path) -> Iterator[None]:
    """Remove a local Ray's files in the end, which is after Ray's; but not where something failed, for its logs."""
    try:
        yield
    except (UsageError, KeyboardInterrupt):
        _remove(session)
        raise
    _remove(session)


def _remove(session: Path) -> None:
    shutil.rmtree(session, ignore_errors=True)
    latest = session.with_name("session_latest")
    with contextlib.suppress(OSError):  # another Ray may have started since, or there is none
        if os.readlink(latest) == str(session):
            latest.unlink()


@contextlib.contextmanager
def for_one_job(
    forking: Forking | None, *, log_to_driver: bool, session_name: str | None = None, has_dashboard: bool = False
) -> Iterator[None]:
    """Let a Ray that is started meanwhile fork its workers, and do without what only a cluster needs.

    Such are the autoscaler, the log monitor where no log is shown, and the process that serves the dashboard, which
    Ray would start for no dashboard, too, and wait for. Its processes have sessions of their own, so that a signal to
    all processes of the job leaves them to save a checkpoint with; on Linux, the kernel ends them with the job.
    """
    parameters: dict[str, Any] = {"no_monitor": True, "include_log_monitor": log_to_driver}
    serves_nothing = ray_internals.replaced(ray_internals.Node, "start_api_server", lambda node, **options: None)
    if session_name is not None:
        parameters["session_name"] = session_name
    if forking is not None and forking.server is not None:
        parameters["setup_worker_path"] = str(SHIM)
    create = ray_internals.RayParams.__init__
    known = {name: value for name, value in parameters.items() if name in inspect.signature(create).parameters}
    start, is_linux = ray_internals.services.ConsolePopen, sys.platform.startswith("linux")
    with (
        ray_internals.replaced(
            ray_internals.services, "ConsolePopen", functools.partial(start, start_new_session=is_linux)
        ),
        ray_internals.replaced(ray_internals.RayParams, "__init__", functools.partialmethod(create, **known)),
        contextlib.nullcontext() if has_dashboard else serves_nothing,
    ):
        yield


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a Ray that is started meanwhile listen on loopback only, as Ray does by itself on macOS and Windows."""
    with ray_internals.replaced(ray_internals.ray_constants, "ENABLE_RAY_CLUSTER", False):
        yield
