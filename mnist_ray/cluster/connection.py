"""Starts and ends one connection to Ray."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import ray
from ray.job_config import JobConfig

from mnist_ray import extras
from mnist_ray.cluster import nodes
from mnist_ray.cluster.environment import for_workers, prepare_local
from mnist_ray.cluster.plan import local_cpus
from mnist_ray.cluster.session_files import about_folder, sessions_here
from mnist_ray.cluster.watch import RaySilentError
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import JobError, about_ray, first_line
from mnist_ray.process import in_thread
from mnist_ray.ray_versions import has_tokens
from mnist_ray.signals import take_signals
from mnist_ray.storage import others_can_write
from ray_fork.shim import has_been_silent
from ray_fork.starting import Forking, runtime_env_to_fork

_WORKER_START_TIMEOUT_S = 50.0
_DISCONNECT_TIMEOUT_S = 5.0


def start_local(folder: Path, config: WorkerConfig, forking: Forking | None, **options: Any) -> None:
    """Start a local Ray with its sessions in ``folder``. Raises a JobError that names the logs."""
    prepare_local()
    before, num_cpus = sessions_here(folder), local_cpus(config)
    try:
        with contextlib.ExitStack() as during_start:
            if extras.is_on("loopback", plain=config.plain_ray):
                from mnist_ray.extras import loopback

                during_start.enter_context(loopback.on_loopback())
            if extras.is_on("small", plain=config.plain_ray):
                from mnist_ray.extras import small

                during_start.enter_context(small.for_one_job(log_to_driver=options["log_to_driver"]))
            if forking is not None:
                from mnist_ray.extras import workers

                during_start.enter_context(workers.shim_in_local_ray(forking))
                options["runtime_env"] = {"env_vars": for_workers()}
            _init(address="local", num_cpus=num_cpus, include_dashboard=False, **options)
    except Exception as error:
        reason = about_ray(error) or first_line(error)
        logs = [f" (logs: {session / 'logs'})" for session in sessions_here(folder) - before]
        raise JobError(f"a local Ray cannot start: {reason}{about_folder()}{''.join(logs)}") from error


def join(address: str, forking: Forking | None, **options: Any) -> None:
    """Join the cluster at ``address``. Raises JobError."""
    if forking is not None:
        if forking.server is not None:  # for a local Ray; on a cluster, each node's first worker starts one
            forking.server.kill()
        options["runtime_env"] = runtime_env_to_fork(forking)
    try:
        _init(address=address, **options)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        advice = "; install the cluster's versions, or use ray job submit" if type(error) is RuntimeError else ""
        raise JobError(f"cannot connect to the Ray cluster at {address}: {reason}{advice}") from error


class _SafeFolders(list[str]):
    """Folders that Ray's workers import from: Ray adds the script's and the current one, unless others can write there.

    Ray has no public setting for this.
    """

    def extend(self, folders: Iterable[str]) -> None:
        super().extend(folder for folder in folders if not others_can_write(folder))


def _init(**options: Any) -> None:
    """Connect. Ray handles SIGTERM meanwhile; afterwards, restore the job's own handlers."""
    job_config = JobConfig()
    job_config._py_driver_sys_path = _SafeFolders()
    try:
        ray.init(job_config=job_config, **options)
    except SystemExit as ending:
        raise KeyboardInterrupt from ending
    finally:
        take_signals()


@contextlib.contextmanager
def connected(start: Callable[[], None], leaving: threading.Thread) -> Iterator[None]:
    """Connect by calling ``start``. At the end, disconnect; if ``leaving`` already does, wait for it instead.

    Raises Ray's own errors as one-line JobErrors, and errors in a task's code unchanged.
    """
    logs, disconnect = Path(), ray.shutdown
    try:
        start()
        logs = nodes.session_folder() / "logs"
        yield
    except RaySilentError as error:
        # While a part of Ray hangs, ray.shutdown would wait for its answer. If a part has died, Ray ends this process
        # a few seconds later unless it disconnects, even if the caller from Python has caught the error.
        disconnect = _disconnect_soon if error.has_died else lambda: None
        raise
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        raise JobError(f"Ray failed: {type(error).__name__}: {first_line(error)} (logs: {logs})") from error
    finally:
        if leaving.ident is not None:
            leaving.join()
        else:
            disconnect()


def start_worker(log_folder: str) -> list[str]:
    """Start a worker on this node, for the first actor to take over. Return notes for the user.

    Raises JobError if no worker starts. Ray itself would try five times, for a minute each.
    """
    started = ray.remote(num_cpus=0, scheduling_strategy=nodes.this_node())(has_been_silent).remote()
    try:
        is_slow = ray.get(started, timeout=_WORKER_START_TIMEOUT_S)
        return ["workers start slowly: the fork server does not answer (--fork-workers no)"] if is_slow else []
    except ray.exceptions.GetTimeoutError as error:
        log = Path(log_folder) / "raylet.err"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line and not line.startswith("[")]
        last = f"; a worker's last line: {lines[-1]}" if lines else ""
        raise JobError(f"Ray's worker processes do not start{last} (log: {log})") from error


def about_access() -> list[str]:
    """Return a note for the user if others can use this local Ray and thus run code as this user."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode not in ("", "token"):  # the user has chosen this
        return []
    is_local = ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback
    others = "other users of this machine" if is_local else "anyone who can reach this machine's ports"
    if not has_tokens():
        return [f"{others} can run code as you while this job runs: Ray supports tokens only since 2.52"]
    if not mode:
        return [f"{others} can run code as you while this job runs: set RAY_AUTH_MODE=token before Ray is imported"]
    return [] if is_local else ["this local Ray listens on all interfaces; only its token keeps others out"]


def _disconnect_soon() -> None:
    """Disconnect from Ray after a part of it has died, but do not wait long."""
    wait([in_thread(ray.shutdown)], _DISCONNECT_TIMEOUT_S)
