"""Ray: joining a cluster, or starting one of this job's own on this machine, as small as one job needs it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_ray.cluster import ray_internals
from mnist_ray.cluster.environment import for_workers, prepare_local, users_variables
from mnist_ray.cluster.plan import Cluster, Node, local_cpus, node_of
from mnist_ray.cluster.watch import RaySilentError, watched
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import JobError, UsageError, first_line
from mnist_ray.signals import take_signals
from ray_fork.starting import Forking, own_runtime_env, runtime_env_to_fork

_WORKER_START_TIMEOUT_S = 50.0
_CONNECT_TIMEOUT_S = 4.0


@contextlib.contextmanager
def connect(
    config: WorkerConfig,
    forking: Forking | None = None,
    *,
    verbose: bool = False,
    dashboard: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[Cluster]:
    """Connect to the cluster of ``RAY_ADDRESS`` or of this machine's ``ray start``, else start a local Ray.

    A connection that this process has already is used and left open.
    A local Ray counts at least the CPUs asked for, so that more workers than cores can run. On leaving, the
    connection is closed, and a local Ray ended; its files go too, unless something has failed.
    Raises JobError if the named cluster does not answer, or a local Ray does not start; UsageError if it cannot.

    ``dashboard``: a local Ray serves its own. ``meanwhile`` is done in a thread while Ray and its first worker start,
    which is mostly waiting; what it raises is raised. ``forking`` tells how the workers are forked, if they are.
    """
    if ray.is_initialized():
        meanwhile()
        yield _describe(is_local=False)
        return
    options = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.CRITICAL}
    if not verbose:
        quiet_ray()
    address, leaving = _find_cluster(), threading.Thread(target=ray.shutdown)
    if address is None:
        connection = _local_ray(local_cpus(config), forking, leaving, has_dashboard=dashboard, **options)
    else:
        connection = _joined(address, forking, leaving, **options)
    take_signals()
    with contextlib.ExitStack() as at_the_end:
        at_the_end.enter_context(ray_internals.without_sigterm_handler())
        if "working_dir" in own_runtime_env():
            # As a job connects, a second node on this machine may replace its working directory, and without a current
            # directory torch cannot be imported.
            meanwhile()
            meanwhile = _nothing
        with in_background(meanwhile):
            at_the_end.enter_context(connection)
            at_the_end.enter_context(_errors_in_one_line())
            cluster = _describe(is_local=address is None)
            _start_worker(cluster.log_folder)
        stop_watching = at_the_end.enter_context(watched())

        def leave() -> None:
            stop_watching()
            leaving.start()

        yield dataclasses.replace(cluster, leave=leave)


@contextlib.contextmanager
def _local_ray(
    num_cpus: int, forking: Forking | None, leaving: threading.Thread, *, has_dashboard: bool, **options: Any
) -> Iterator[None]:
    """Start a Ray that listens on loopback only; in the end, leave it and remove its files.

    Whatever its start raises becomes one line that says where its logs are, and which variables for Ray the user has
    set: one of them may be the reason.
    """
    session = ray_internals.default_folder() / f"session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}"
    names = users_variables()
    prepare_local()
    small = ray_internals.for_one_job(
        forking, log_to_driver=options["log_to_driver"], session_name=session.name, has_dashboard=has_dashboard
    )
    with removed_unless_failed(session), _left(leaving):
        try:
            with ray_internals.on_loopback(), small:
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    include_dashboard=has_dashboard,
                    runtime_env={"env_vars": for_workers()},
                    _temp_dir=str(session.parent),
                    **options,
                )
        except Exception as error:
            variables = f"; set are {', '.join(names)}" if names else ""
            said = f"a local Ray cannot start: {first_line(error)} (logs: {session / 'logs'}{variables})"
            raise JobError(said) from error
        yield


@contextlib.contextmanager
def removed_unless_failed(session: Path) -> Iterator[None]:
    """Remove a local Ray's files in the end, which is after Ray's; but not if something failed, for its logs."""
    has_failed = False
    try:
        yield
    except Exception as error:
        has_failed = not isinstance(error, UsageError)
        raise
    finally:
        if not has_failed:
            shutil.rmtree(session, ignore_errors=True)
            latest = session.with_name("session_latest")  # Ray makes it, but replaces none that leads nowhere
            with contextlib.suppress(OSError):  # another Ray may have started since, or there is none
                if os.readlink(latest) == str(session):
                    latest.unlink()


@contextlib.contextmanager
def _joined(address: str, forking: Forking | None, leaving: threading.Thread, **options: Any) -> Iterator[None]:
    """Connect to a cluster; in the end, leave it. Raises JobError if it does not let us in."""
    if forking is not None:
        options["runtime_env"] = runtime_env_to_fork(forking)
    with _left(leaving):
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[-1]
            raise JobError(f"cannot connect to the Ray cluster at {address}: {reason}") from error
        yield


@contextlib.contextmanager
def _left(leaving: threading.Thread) -> Iterator[None]:
    """Disconnect at the end, or wait until that is done if ``leaving`` has begun it."""
    has_answered = True
    try:
        yield
    except RaySilentError:
        has_answered = False  # ray.shutdown would wait for an answer, too; a local Ray ends with this process
        raise
    finally:
        if leaving.ident is not None:
            leaving.join()
        elif has_answered:
            ray.shutdown()


def _start_worker(log_folder: str) -> None:
    """Start a worker beside this process; the first actor takes its place.

    Raises JobError if none starts. If worker processes die at once, Ray tries five times, and waits for a minute each
    time.
    """
    started = ray.remote(num_cpus=0, scheduling_strategy=this_node())(_nothing).remote()
    try:
        ray.get(started, timeout=_WORKER_START_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError as error:
        log = Path(log_folder) / "raylet.err"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line and not line.startswith("[")]
        said = f"; the last that one wrote: {lines[-1]}" if lines else ""
        raise JobError(f"Ray's worker processes do not start{said} (log: {log})") from error


def _nothing() -> None:
    """Do nothing."""


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Say in one line what Ray itself has failed at meanwhile; an error of a task's own code stays what it is."""
    logs = ray_internals.session_folder() / "logs"
    try:
        yield
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        raise JobError(f"Ray failed: {type(error).__name__}: {first_line(error)} (logs: {logs})") from error


@contextlib.contextmanager
def in_background(work: Callable[[], None]) -> Iterator[None]:
    """Do some work in a thread meanwhile; it is done afterwards, and its exception is raised."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        yield
        done.result()


def this_node() -> NodeAffinitySchedulingStrategy:
    """Return the strategy that puts an actor beside this process, so that it does not go with another node."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def quiet_ray() -> None:
    """Keep Ray's own log off the console; it stays in its files, and whatever fails is raised as well."""
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"ray\.")


def _find_cluster() -> str | None:
    """Return the address of the cluster to connect to, or None if a local Ray is to be started.

    Not ``ray.init(address="auto")``: that would also join the local Ray of any other job on this machine, and wait
    for minutes for a cluster that is gone.
    """
    named = os.environ.get("RAY_ADDRESS", "auto") or "auto"
    if named == "local":
        return None
    if named == "auto":
        started_here = ray_internals.address_of_ray_start()
        return started_here if started_here and _answers(started_here) else None
    if "://" in named:
        raise UsageError(f"RAY_ADDRESS={named} is no HOST:PORT; for a dashboard's address, use ray job submit")
    if not _answers(named):
        raise JobError(f"no Ray cluster answers at RAY_ADDRESS={named}; unset it to start a local one")
    return named


def _answers(address: str) -> bool:
    """Tell whether a Ray answers at an address, not something else that listens there. Raises JobError at its no."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        ray_internals.ask(address, _CONNECT_TIMEOUT_S)
    except ray.exceptions.AuthenticationError as error:
        advice = "give it the one of the head's ~/.ray/auth_token, in that file or RAY_AUTH_TOKEN"
        raise JobError(f"the Ray cluster at {address} asks for another token; {advice}") from error
    except (OSError, ValueError, OverflowError, ray.exceptions.RayError):
        return False
    return True


def _describe(is_local: bool) -> Cluster:
    logs = ray_internals.session_folder() / "logs"
    return Cluster(is_local, _nodes(), str(logs), dashboard=ray_internals.dashboard_address())


def _nodes() -> tuple[Node, ...]:
    return tuple(node_of(node["Resources"]) for node in ray.nodes() if node["Alive"])


def as_it_is_now(cluster: Cluster) -> Cluster:
    """Return a cluster with the nodes that are there by now: an autoscaler starts and ends some."""
    return dataclasses.replace(cluster, nodes=_nodes())
