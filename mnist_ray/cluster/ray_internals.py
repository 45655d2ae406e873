"""The private API of Ray that the package needs where there is no public API; see also ``train_internals``.

Each function states its reason. A test fails if Ray changes this API.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._common.utils import get_default_ray_temp_dir, get_ray_address_file
from ray._private import ray_constants, services, utils
from ray._private.authentication.authentication_token_setup import (
    AUTH_MODE_ENV_VAR,
    maybe_enable_token_auth_if_token_available,
)
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.state import state
from ray._private.worker import global_worker
from ray._raylet import InnerGcsClient  # type: ignore[attr-defined]  # Cython, partly without stubs
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup

from ray_fork.ray_internals import read_settings_again
from ray_fork.shim import own_folder
from ray_fork.starting import SHIM, Forking

_END_TIMEOUT_S = 5.0  # of one of Ray's processes
_AGENT = os.path.join(services.RAY_PATH, "dashboard", "agent.py")
_NO_DASHBOARD = str(Path(__file__).with_name("no_dashboard.py"))
_MAX_ADDRESS = 300  # bytes
_NO_ACTOR = b"\xff" * 12  # the start of an actor id that means "none"; the job's id follows


@contextlib.contextmanager
def for_one_job(forking: Forking | None, *, log_to_driver: bool, session_name: str | None = None) -> Iterator[None]:
    """Let a Ray that is started inside the block fork its workers, and leave out what only a cluster needs.

    These are the autoscaler, the log monitor if no log is shown, and the dashboard's process and agent, which Ray would
    start and wait for even without a dashboard. Ray's processes get sessions of their own: a signal to all processes of
    the job does not reach them, so that the job can still save a checkpoint. On Linux, the kernel ends them with the
    job. If the block is interrupted or fails, they are ended: Ray itself would leave them until this process ends.
    """
    started: list[services.ConsolePopen] = []
    parameters = {"no_monitor": True, "include_log_monitor": log_to_driver, "session_name": session_name}
    if forking is not None and forking.server is not None:
        # The shim starts each worker. A runtime environment's py_executable would first cost an import of Ray.
        parameters["setup_worker_path"] = str(SHIM)
    with_parameters = functools.partialmethod(RayParams.__init__, **parameters)
    is_linux = sys.platform.startswith("linux")
    popen = services.ConsolePopen
    agent, no_agent = (subprocess.list2cmdline([path]) for path in (_AGENT, _NO_DASHBOARD))

    def in_own_session(command: list[str], **options: Any) -> Any:
        words = [word.replace(agent, no_agent) for word in command]  # it is in an option of the raylet
        started.append(popen(words, start_new_session=is_linux, **options))
        return started[-1]

    with (
        _replaced(services, "ConsolePopen", in_own_session),
        _replaced(RayParams, "__init__", with_parameters),
        _replaced(Node, "start_api_server", lambda node, **options: None),
        _replaced(utils, "get_dashboard_dependency_error", lambda: None),  # it would import the dashboard's packages
    ):
        try:
            yield
        except BaseException:
            for process in reversed(started):  # the raylet, which ends its agents, before the GCS
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_END_TIMEOUT_S)
                process.kill()
            raise


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Let a Ray that is started inside the block listen on loopback only, as on macOS."""
    with _replaced(ray_constants, "ENABLE_RAY_CLUSTER", False):  # Ray's import has already read the variable for it
        yield


@contextlib.contextmanager
def without_sigterm_handler() -> Iterator[None]:
    """Keep the job's handler of SIGTERM inside the block: Ray would replace it by one that exits at once."""
    with _replaced(utils, "set_sigterm_handler", lambda handler: None):
        yield


def read_uv_setting_again() -> None:
    """Let workers use the environment that ``uv run`` has made, even if a script has imported Ray first."""
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = os.environ.get("RAY_ENABLE_UV_RUN_RUNTIME_ENV") == "1"


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def default_folder() -> Path:
    """Return the folder of local Rays' sessions, so that a session can be named before it starts, and removed.

    Unless RAY_TMPDIR names another, it is in a folder of this user's own: Ray lets everybody write to its sessions.
    """
    own = "RAY_TMPDIR" not in os.environ
    return Path(f"{own_folder('mnist_ray')}/ray" if own else get_default_ray_temp_dir()).absolute()


def session_folder() -> Path:
    """Return the folder of this node's Ray."""
    return Path(global_worker.node.get_session_dir_path())


def is_connected_to(session: Path) -> bool:
    """Return whether this process is connected to the Ray of a session."""
    return ray.is_initialized() and session_folder() == session


def uses_of_ray() -> set[bytes]:
    """Return ids of what this process has made in Ray: exported functions and classes, and references that it holds."""
    exported = global_worker.gcs_client.internal_kv_keys(b"", ray_constants.KV_NAMESPACE_FUNCTION_TABLE)
    return {*exported, *global_worker.core_worker.get_all_reference_counts()}


def dead_processes() -> list[str]:
    """Return the names of dead parts of the local Ray that this process has started, without which nothing runs."""
    return [name for name, _ in global_worker.node.dead_processes() if name in ("gcs_server", "raylet")]


def num_nodes_here() -> int:
    """Return how many of Ray's nodes run on this machine, as far as this process can see."""
    return sum(process.info["name"] == "raylet" for process in psutil.process_iter(["name"]))


def address_of_ray_start() -> str | None:
    """Return the address of this user's ``ray start`` on this machine; None if there is none that runs.

    "auto" would also join the local Ray of another job, or whatever another user names in a folder for all users: this
    process would send its token there, and run the code that it gets. Raises OSError if there is such a file, but
    another user can have written it.
    """
    file = get_ray_address_file(None)
    if not os.path.lexists(file):
        return None
    with open(file, "rb", opener=_without_detours) as stream:
        found = os.fstat(stream.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a file", file)
        if {found.st_uid, os.stat(os.path.dirname(file)).st_uid} - {0, os.geteuid()}:
            raise OSError(errno.EPERM, "another user may have written it", file)
        address = stream.read(_MAX_ADDRESS).decode(errors="replace").strip()
    return address if os.geteuid() in owners_here(address) and _has_own_gcs(address) else None


def _without_detours(path: str, flags: int) -> int:
    """Open a file, but follow no link, and do not wait for whoever may write into a FIFO."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def owners_here(address: str) -> set[int]:
    """Return the users that run a node of a cluster on this machine."""
    running = (process.info for process in psutil.process_iter(["name", "uids", "cmdline"]))
    raylets = [info for info in running if info["name"] == "raylet"]
    return {info["uids"].effective for info in raylets if f"--gcs-address={address}" in (info["cmdline"] or ())}


def _has_own_gcs(address: str) -> bool:
    """Tell whether a process of this user listens at the address of a GCS, or that is on another machine."""
    host, _, port = address.rpartition(":")
    if not any(host == own.address for of_card in psutil.net_if_addrs().values() for own in of_card):
        return True
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error):  # another user's, or it has ended
            if process.info["name"] == "gcs_server" and process.uids().effective == os.geteuid():
                connections = process.net_connections("tcp")
                if any(own.status == psutil.CONN_LISTEN and str(own.laddr.port) == port for own in connections):
                    return True
    return False


def ask(address: str, timeout_s: float) -> None:
    """Raise a RayError if no Ray answers at an address within ``timeout_s``; ``ray.init`` would try for minutes.

    From then on, this process sends its token if the cluster wants it; else the actors of the job would die.
    """
    os.environ.pop(AUTH_MODE_ENV_VAR, None)
    read_settings_again()
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # Ray's C++ would print each of its three attempts
    try:
        InnerGcsClient.standalone(address, None, int(timeout_s * 1000))
    except ray.exceptions.AuthenticationError:
        if not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
            raise
        InnerGcsClient.standalone(address, None, int(timeout_s * 1000))
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def actors_of(class_name: str) -> set[str]:
    """Return the ids of this job's actors of a class; this process has no handles for them."""
    job_id = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    actors = state.actor_table(None, job_id).items()
    return {key for key, actor in actors if actor["ActorClassName"] == class_name and actor["State"] != "DEAD"}


def kill_actor(actor_id: str) -> None:
    """Kill an actor by its id."""
    global_worker.core_worker.kill_actor(ray.ActorID.from_hex(actor_id), True)


def orphaned_placement_groups() -> list[PlacementGroup]:
    """Return the placement groups of dead actors of this job; the public table does not name the actors."""
    job_id, orphans = bytes.fromhex(ray.get_runtime_context().get_job_id()), []
    for serialized in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(serialized)
        is_there = group.state != PlacementGroupTableData.REMOVED
        is_drivers = group.creator_actor_id.startswith(_NO_ACTOR)
        if is_there and group.creator_actor_dead and not is_drivers and group.creator_job_id == job_id:
            orphans.append(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return orphans
