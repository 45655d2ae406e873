"""Connects to Ray: joins a cluster, or starts a local Ray. At the end, disconnects."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import ray
from ray.job_config import JobConfig

from mnist_ray import extras, network
from mnist_ray.cluster import nodes
from mnist_ray.cluster.environment import for_workers, prepare_local
from mnist_ray.cluster.plan import Cluster, local_cpus
from mnist_ray.cluster.session_files import about_folder, removed_unless_failed, sessions_folder, sessions_here
from mnist_ray.cluster.watch import RaySilentError, watched
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import JobError, UsageError, about_ray, first_line
from mnist_ray.process import in_thread
from mnist_ray.ray_versions import has_tokens
from mnist_ray.signals import end_with, take_signals
from mnist_ray.storage import in_one_line, others_can_write
from ray_fork.starting import Forking, own_runtime_env, runtime_env_to_fork

_WORKER_START_TIMEOUT_S = 50.0
_DISCONNECT_TIMEOUT_S = 5.0


@contextlib.contextmanager
def connect(
    config: WorkerConfig,
    forking: Forking | None = None,
    *,
    verbose: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[Cluster]:
    """Connect to the cluster of ``RAY_ADDRESS`` or of this machine's ``ray start``, else start a local Ray.

    If this process is already connected, use that connection and leave it open. A local Ray declares at least the CPUs
    that the job asks for, so that more workers than cores can run. At the end, disconnect, shut a local Ray down, and
    remove its files unless something failed. Raises JobError if the cluster does not answer or a local Ray does not
    start, and UsageError if ``config`` or ``RAY_ADDRESS`` is impossible.

    ``meanwhile`` runs in a thread while Ray and a first worker start. Its exception ends the start, and is raised here.
    """
    if ray.is_initialized():
        with _own_connection(config, meanwhile) as cluster:
            yield cluster
        return
    options = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.CRITICAL}
    if not verbose:  # Ray still writes its log files, and failures are still raised
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", module=r"ray\.")
    leaving = threading.Thread(target=ray.shutdown)
    with (
        _new_connection(config, forking, meanwhile, leaving, **options) as cluster,
        watched(plain=config.plain_ray) as stop_watching,
    ):

        def leave() -> None:
            stop_watching()
            leaving.start()

        yield dataclasses.replace(cluster, leave=leave)


@contextlib.contextmanager
def _new_connection(
    config: WorkerConfig,
    forking: Forking | None,
    meanwhile: Callable[[], None],
    leaving: threading.Thread,
    **options: Any,
) -> Iterator[Cluster]:
    """Join the cluster or start a local Ray. At the end, disconnect, unless ``leaving`` already does."""
    address, notes = _find_cluster(plain=config.plain_ray)
    if extras.is_on("workers", plain=config.plain_ray):
        from mnist_ray.extras import workers

        workers.read_uv_setting_again()
    elif forking is not None:
        forking.at_the_end.close()  # of the server
        forking = None
    with contextlib.ExitStack() as at_the_end:
        if address is None:
            with in_one_line("a local Ray cannot start"):
                folder = sessions_folder()
            at_the_end.enter_context(removed_unless_failed(folder))
            if extras.is_on("small", plain=config.plain_ray):
                from mnist_ray.extras import small

                at_the_end.callback(small.wait_until_ended)
            start = functools.partial(start_local, folder, config, forking, **options)
        else:
            start = functools.partial(join, address, forking, **options)
        if "working_dir" in own_runtime_env() and nodes.num_nodes_here() > 1:
            # When the job connects, another node on this machine may replace its working directory. Then the job
            # cannot import torch.
            meanwhile()
            meanwhile = _nothing
        with _in_parallel(meanwhile):
            at_the_end.enter_context(connected(start, leaving))
            cluster = _describe(is_local=address is None)
            start_worker(cluster.log_folder)
            notes += about_access() if cluster.is_local else []
        yield dataclasses.replace(cluster, notes=tuple(notes))


@contextlib.contextmanager
def _in_parallel(meanwhile: Callable[[], None]) -> Iterator[None]:
    """Call a function in a thread during the block. If it fails, end the block, and raise its exception instead."""
    is_main, failure = threading.current_thread() is threading.main_thread(), None

    def call() -> None:
        nonlocal failure
        try:
            meanwhile()
        except Exception as error:
            failure = error
            if is_main:
                end_with(error)
            raise

    done = in_thread(call)
    try:
        yield
    except BaseException:  # perhaps the failure, perhaps in other words
        if failure is not None:
            raise failure  # noqa: B904, as its own cause is to stay
        raise
    done.result()


@contextlib.contextmanager
def _own_connection(config: WorkerConfig, meanwhile: Callable[[], None]) -> Iterator[Cluster]:
    """Use this process's connection, and leave it open."""
    if ray.util.client.ray.is_connected():
        raise UsageError("this job cannot use a Ray Client connection; run it on the cluster with ray job submit")
    if extras.is_on("processes", plain=config.plain_ray):
        from mnist_ray.extras import processes

        if processes.dead_processes():
            raise JobError("the Ray that this process started has died; use a new process")
    meanwhile()
    with watched(plain=config.plain_ray):
        yield _describe(is_local=False)


def _find_cluster(*, plain: bool) -> tuple[str | None, list[str]]:
    """Return the address of the cluster to join, or None to start a local Ray, and notes for the user."""
    named = os.environ.get("RAY_ADDRESS", "auto") or "auto"
    if "://" in named or "@" in named:
        shown = re.sub(r"[^/]*@", "***@", named)
        raise UsageError(f"RAY_ADDRESS={shown} is not HOST:PORT; for a dashboard's address, use ray job submit")
    if named != "local" and extras.is_on("address", plain=plain):
        from mnist_ray.extras import address

        return address.find(named)
    if named in ("local", "auto"):
        return None, []
    if not network.listens(named):
        raise JobError(f"no Ray cluster answers at RAY_ADDRESS={named}; unset it to start a local Ray")
    return named, []


def _describe(*, is_local: bool) -> Cluster:
    return Cluster(is_local, nodes.current_nodes(), str(nodes.session_folder() / "logs"))


def _nothing() -> None:
    """Do nothing."""


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


def start_worker(log_folder: str) -> None:
    """Start a worker on this node, for the first actor to take over.

    Raises JobError if no worker starts. Ray itself would try five times, for a minute each.
    """
    started = ray.remote(num_cpus=0, scheduling_strategy=nodes.this_node())(_nothing).remote()
    try:
        ray.get(started, timeout=_WORKER_START_TIMEOUT_S)
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
