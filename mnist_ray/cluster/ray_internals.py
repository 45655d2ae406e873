"""Ray's private API, as far as there is no public way; that of Ray Train is in ``train_internals``.

Each function says what it needs it for, and a test fails if Ray changes what is used here.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import ray_constants, services, utils
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.state import state
from ray._private.worker import global_worker
from ray._raylet import InnerGcsClient  # type: ignore[attr-defined]  # of Cython, some without stubs
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup

from ray_fork.starting import SHIM, Forking

_NO_ACTOR = b"\xff" * 12  # how the id of an actor begins that is none; the rest is the job's


@contextlib.contextmanager
def for_one_job(
    forking: Forking | None, *, log_to_driver: bool, session_name: str | None = None, has_dashboard: bool = False
) -> Iterator[None]:
    """Let a Ray that is started meanwhile fork its workers, and do without what only a cluster needs.

    Such are the autoscaler, the log monitor where no log is shown, and the process that serves the dashboard, which
    Ray would start for no dashboard, too, and wait for. Its processes have sessions of their own, so that a signal to
    all processes of the job leaves them to save a checkpoint with; on Linux, the kernel ends them with the job.
    """
    parameters = {"no_monitor": True, "include_log_monitor": log_to_driver, "session_name": session_name}
    if forking is not None and forking.server is not None:
        # What starts each worker. A runtime environment's py_executable costs an import of Ray before it.
        parameters["setup_worker_path"] = str(SHIM)
    with_parameters = functools.partialmethod(RayParams.__init__, **parameters)
    is_linux = sys.platform.startswith("linux")
    in_own_session = functools.partial(services.ConsolePopen, start_new_session=is_linux)
    serves_nothing = _replaced(Node, "start_api_server", lambda node, **options: None)
    with (
        _replaced(services, "ConsolePopen", in_own_session),
        _replaced(RayParams, "__init__", with_parameters),
        contextlib.nullcontext() if has_dashboard else serves_nothing,
    ):
        yield


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Let a Ray that is started meanwhile listen on loopback only, as on macOS; its variable is read at import."""
    with _replaced(ray_constants, "ENABLE_RAY_CLUSTER", False):
        yield


@contextlib.contextmanager
def without_sigterm_handler() -> Iterator[None]:
    """Keep the job's own handler of SIGTERM meanwhile: Ray would put one in its place that exits at once."""
    with _replaced(utils, "set_sigterm_handler", lambda handler: None):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def default_folder() -> Path:
    """Return where a local Ray keeps its sessions, so that one can be named before it starts, and removed with it."""
    return Path(get_default_ray_temp_dir()).absolute()


def session_folder() -> Path:
    """Return where this node's Ray keeps its files while it runs."""
    return Path(global_worker.node.get_session_dir_path())


def dashboard_address() -> str:
    """Return HOST:PORT of the dashboard; nothing if there is none."""
    return global_worker.node.webui_url or ""


def dead_processes() -> list[str]:
    """Return which processes of the Ray that this job has started have died; those of a cluster are not ours."""
    return [name for name, _ in global_worker.node.dead_processes()]


def address_of_ray_start() -> str | None:
    """Return the address that ``ray start`` has left. "auto" would also join the local Ray of another job."""
    return utils.read_ray_address()


def ask(address: str, timeout_s: float) -> None:
    """Return if a Ray answers at an address, else raise a RayError, in seconds; ``ray.init`` tries for minutes."""
    # If there is a token, `ray start` makes the cluster ask for it; ray.init(address=...) does not show it by itself.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # to which C++ logs each of its three attempts
    try:
        InnerGcsClient.standalone(address, None, int(timeout_s * 1000))
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def kill_actors(class_name: str) -> None:
    """Kill this job's actors of a class, for which nobody here has handles."""
    job_id = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    for actor_id, actor in state.actor_table(None, job_id).items():
        if actor["ActorClassName"] == class_name and actor["State"] != "DEAD":
            global_worker.core_worker.kill_actor(ray.ActorID.from_hex(actor_id), True)


def orphaned_placement_groups() -> list[PlacementGroup]:
    """Return what dead actors of this job have reserved; the public table does not tell who has."""
    job_id, orphans = bytes.fromhex(ray.get_runtime_context().get_job_id()), []
    for serialized in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(serialized)
        is_there = group.state != PlacementGroupTableData.REMOVED
        is_drivers = group.creator_actor_id.startswith(_NO_ACTOR)
        if is_there and group.creator_actor_dead and not is_drivers and group.creator_job_id == job_id:
            orphans.append(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return orphans
