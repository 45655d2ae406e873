"""A Ray of this job's own on this machine, as small as one job needs it."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import ray

from mnist_ray.cluster import private
from mnist_ray.environment import NO_DASHBOARD, for_workers, prepare_local
from mnist_ray.forking.local import SHIM, Forking


def start_local(num_cpus: int, forking: Forking | None, *, log_to_driver: bool, **options: Any) -> None:
    """Start a Ray that listens on loopback only and connect to it."""
    prepare_local()
    parameters: dict[str, Any] = {"no_monitor": True, "include_log_monitor": log_to_driver}
    if forking is not None and forking.server is not None:
        parameters["setup_worker_path"] = str(SHIM)
    with _on_loopback(), _with_parameters(**parameters):
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=log_to_driver,
            runtime_env={"env_vars": for_workers() | NO_DASHBOARD},
            **options,
        )


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a Ray that is started meanwhile listen on loopback only, as Ray does by itself on macOS and Windows."""
    with _replaced(private.ray_constants, "ENABLE_RAY_CLUSTER", False):
        yield


@contextlib.contextmanager
def _with_parameters(**values: Any) -> Iterator[None]:
    """Start a Ray meanwhile with parameters that ``ray.init`` does not take, as far as this version of Ray has them.

    And without the process that serves the dashboard, which Ray would start for no dashboard too, and wait for.
    """
    create = private.RayParams.__init__
    known = {name: value for name, value in values.items() if name in inspect.signature(create).parameters}
    with (
        _replaced(private.RayParams, "__init__", functools.partialmethod(create, **known)),
        _replaced(private.Node, "start_api_server", lambda node, **options: None),
    ):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
