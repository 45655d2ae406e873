"""Ray: starting it or connecting to it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_ray.cluster import ray_internals
from mnist_ray.cluster.environment import users_variables
from mnist_ray.cluster.forking.starting import Forking, own_runtime_env, runtime_env_to_fork
from mnist_ray.cluster.local_ray import new_session, removed_unless_failed, start_local
from mnist_ray.cluster.plan import Cluster, Node, local_cpus, node_of
from mnist_ray.cluster.watch import RaySilentError, watched
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import JobError, UsageError, first_line
from mnist_ray.signals import take_signals

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
    Raises JobError where the named cluster does not answer, or a local Ray does not start; UsageError where it cannot.

    ``dashboard``: a local Ray serves its own. ``meanwhile`` is done while a local Ray starts, or the first worker on a
    cluster, which is mostly waiting; what it raises is raised. ``forking`` tells how the workers are forked, if they
    are.
    """
    if ray.is_initialized():
        meanwhile()
        yield _describe(is_local=False)
        return
    options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.CRITICAL,
    }
    if not verbose:
        quiet_ray()
    address, leaving = _find_cluster(), threading.Thread(target=ray.shutdown)
    take_signals()
    with contextlib.ExitStack() as at_the_end:
        no_handler = ray_internals.replaced(ray_internals.utils, "set_sigterm_handler", lambda handler: None)
        at_the_end.enter_context(no_handler)
        if address is None:
            at_the_end.enter_context(_local_ray(config, forking, options, dashboard, meanwhile, leaving))
            meanwhile = _nothing
        else:
            at_the_end.enter_context(_left(leaving))
            meanwhile = _join(address, forking, options, meanwhile)
        with errors_in_one_line(), contextlib.ExitStack() as watching:
            cluster = _describe(is_local=address is None)
            with _worker_starting(cluster):
                meanwhile()
            stop_watching = watching.enter_context(watched())

            def leave() -> None:
                stop_watching()
                leaving.start()

            yield dataclasses.replace(cluster, leave=leave)


@contextlib.contextmanager
def _local_ray(
    config: WorkerConfig,
    forking: Forking | None,
    options: dict[str, Any],
    has_dashboard: bool,
    meanwhile: Callable[[], None],
    leaving: threading.Thread,
) -> Iterator[None]:
    """Start a local Ray, with ``meanwhile`` done beside that; in the end, leave it and remove its files."""
    num_cpus, session = local_cpus(config), new_session()
    with removed_unless_failed(session), _left(leaving):
        with _beside(meanwhile), _start_in_one_line(session):
            start_local(num_cpus, forking, session, has_dashboard=has_dashboard, **options)
        yield


def _join(
    address: str, forking: Forking | None, options: dict[str, Any], meanwhile: Callable[[], None]
) -> Callable[[], None]:
    """Connect to a cluster; return what is left to be done while its first worker starts."""
    if "working_dir" in own_runtime_env():
        # As a job connects, a second node on this machine may lay its working directory anew, and without a current
        # directory torch cannot be imported.
        meanwhile()
        meanwhile = _nothing
    if forking is not None:
        options["runtime_env"] = runtime_env_to_fork(forking)
    _init(address, options)
    return meanwhile


@contextlib.contextmanager
def _left(leaving: threading.Thread) -> Iterator[None]:
    """Disconnect at the end, or wait until that is done where ``leaving`` has begun it."""
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


@contextlib.contextmanager
def _worker_starting(cluster: Cluster) -> Iterator[None]:
    """Let a worker start beside this process meanwhile; the first actor takes its place.

    Raises JobError where none does. Where worker processes die at once, Ray tries five times, and waits for a minute
    each time.
    """
    started = _start.options(scheduling_strategy=this_node()).remote()
    yield
    try:
        ray.get(started, timeout=_WORKER_START_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError as error:
        log = Path(cluster.log_folder) / "raylet.err"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line and not line.startswith("[")]
        said = f"; the last that one wrote: {lines[-1]}" if lines else ""
        raise JobError(f"Ray's worker processes do not start{said} (log: {log})") from error


@ray.remote(num_cpus=0)
def _start() -> None:
    """Do nothing but be there."""


def _nothing() -> None:
    """Do nothing, where all is done."""


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Say in one line what Ray itself has failed at meanwhile; an error of a task's own code stays what it is."""
    logs = session_folder() / "logs"
    try:
        yield
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        raise JobError(f"Ray failed: {type(error).__name__}: {first_line(error)} (logs: {logs})") from error


@contextlib.contextmanager
def _start_in_one_line(session: Path) -> Iterator[None]:
    """Say in one line why a local Ray does not start, which may raise anything, and where its logs are.

    The variables for Ray that the user has set are named, too: one of them may be the reason.
    """
    names = users_variables()
    try:
        yield
    except Exception as error:
        variables = f"; set are {', '.join(names)}" if names else ""
        raise JobError(
            f"a local Ray cannot start: {first_line(error)} (logs: {session / 'logs'}{variables})"
        ) from error


@contextlib.contextmanager
def _beside(work: Callable[[], None]) -> Iterator[None]:
    """Do some work in a thread meanwhile; it is done afterwards, and what it raised is raised."""
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


def _init(address: str, options: dict[str, Any]) -> None:
    """Connect to a cluster. Raises JobError where it does not let us in."""
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        raise JobError(f"cannot connect to the Ray cluster at {address}: {reason}") from error


def _find_cluster() -> str | None:
    """Return the address of the cluster to connect to, or None where a local Ray is to be started.

    Not ``ray.init(address="auto")``: that would also join the local Ray of any other job on this machine, and wait
    for minutes for a cluster that is gone.
    """
    named = os.environ.get("RAY_ADDRESS", "auto") or "auto"
    if named == "local":
        return None
    if named == "auto":
        started_here = ray_internals.read_ray_address()  # what ``ray start`` has left
        return started_here if started_here and _answers(started_here) else None
    if "://" in named:
        raise UsageError(f"RAY_ADDRESS={named} is no HOST:PORT; for a dashboard's address, use ray job submit")
    if not _answers(named):
        raise JobError(f"no Ray cluster answers at RAY_ADDRESS={named}; unset it to start a local one")
    return named


def _answers(address: str) -> bool:
    """Tell whether a Ray answers at an address, not something else that listens there. Raises JobError at its no."""
    # Where there is a token, `ray start` makes the cluster ask for it; so has a client to be told to show it.
    ray_internals.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        with _without_standard_error():  # to which it logs each of its three attempts
            ray_internals.InnerGcsClient.standalone(address, None, int(_CONNECT_TIMEOUT_S * 1000))
    except ray.exceptions.AuthenticationError as error:
        advice = "give it the one of the head's ~/.ray/auth_token, in that file or RAY_AUTH_TOKEN"
        raise JobError(f"the Ray cluster at {address} asks for another token; {advice}") from error
    except (OSError, ValueError, OverflowError, ray.exceptions.RayError):
        return False
    return True


@contextlib.contextmanager
def _without_standard_error() -> Iterator[None]:
    """Drop what this process, its C++ parts included, writes to its standard error meanwhile."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _describe(is_local: bool, leave: Callable[[], None] = lambda: None) -> Cluster:
    dashboard = ray_internals.global_worker.node.webui_url
    return Cluster(is_local, _nodes(), str(session_folder() / "logs"), leave, dashboard or "")


def _nodes() -> tuple[Node, ...]:
    return tuple(node_of(node["Resources"]) for node in ray.nodes() if node["Alive"])


def session_folder() -> Path:
    """Return where this node's Ray keeps its files while it runs."""
    return Path(ray_internals.global_worker.node.get_session_dir_path())


def as_it_is_now(cluster: Cluster) -> Cluster:
    """Return a cluster with the nodes that are there by now: an autoscaler starts and ends some."""
    return dataclasses.replace(cluster, nodes=_nodes())
