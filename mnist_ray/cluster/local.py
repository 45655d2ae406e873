"""A Ray of this job's own on this machine, as small as one job needs it."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import ray

from mnist_ray import private
from mnist_ray.environment import for_workers, prepare_local
from mnist_ray.forking.local import SHIM, Forking


def start_local(num_cpus: int, forking: Forking | None, *, log_to_driver: bool, **options: Any) -> None:
    """Start a Ray that listens on loopback only and connect to it."""
    prepare_local()
    with _on_loopback(), for_one_job(forking, log_to_driver=log_to_driver):
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=log_to_driver,
            runtime_env={"env_vars": for_workers()},
            **options,
        )


@contextlib.contextmanager
def for_one_job(forking: Forking | None, *, log_to_driver: bool) -> Iterator[None]:
    """Let a Ray that is started meanwhile fork its workers, and do without what only a cluster needs.

    Such are the autoscaler, the log monitor where no log is shown, and the process that serves the dashboard, which
    Ray would start for no dashboard, too, and wait for.
    """
    parameters: dict[str, Any] = {"no_monitor": True, "include_log_monitor": log_to_driver}
    if forking is not None and forking.server is not None:
        parameters["setup_worker_path"] = str(SHIM)
    create = private.RayParams.__init__
    known = {name: value for name, value in parameters.items() if name in inspect.signature(create).parameters}
    with (
        private.replaced(private.RayParams, "__init__", functools.partialmethod(create, **known)),
        private.replaced(private.Node, "start_api_server", lambda node, **options: None),
    ):
        yield


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a Ray that is started meanwhile listen on loopback only, as Ray does by itself on macOS and Windows."""
    with private.replaced(private.ray_constants, "ENABLE_RAY_CLUSTER", False):
        yield
