"""Connects to Ray: joins a cluster, or starts a local Ray with only what one job needs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import re
import shutil
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import datetime
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_ray.cluster import kept, ray_internals
from mnist_ray.cluster.environment import for_workers, prepare_local
from mnist_ray.cluster.plan import Cluster, Node, local_cpus, node_of
from mnist_ray.cluster.watch import RaySilentError, in_thread, watched
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import JobError, UsageError, about_limit, about_ray, first_line
from mnist_ray.storage import in_one_line
from ray_fork.shim import has_been_silent
from ray_fork.starting import Forking, own_runtime_env, runtime_env_to_fork

_WORKER_START_TIMEOUT_S = 50.0
_CONNECT_TIMEOUT_S = 4.0
_DISCONNECT_TIMEOUT_S = 5.0
_WAITING_SAID_AFTER_S, _WAITING_SAID_EVERY_S = 30.0, 300.0  # a start takes up to 20 s


@contextlib.contextmanager
def connect(
    config: WorkerConfig,
    forking: Forking | None = None,
    *,
    verbose: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[Cluster]:
    """Connect to the cluster of ``RAY_ADDRESS`` or of this machine's ``ray start``, else start a local Ray.

    If this process is connected already, that connection is used and left open. A local Ray declares at least the
    CPUs that the job asks for, so that more workers than cores can run. At the end, the connection is closed, and a
    local Ray is ended; one of a call from Python that has ended well is kept for the next call. A local Ray's files are
    removed unless something failed. Raises JobError if the cluster does not answer or a local Ray does not start, and
    UsageError if ``config`` or ``RAY_ADDRESS`` is impossible.

    ``meanwhile`` runs in a thread while this function waits for Ray and a first worker to start; its exception is
    raised here.
    """
    resources = kept.take(config, verbose=verbose)
    if resources is None and ray.is_initialized():
        with _own_connection(meanwhile) as cluster:
            yield cluster
        return
    options = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.CRITICAL}
    if not verbose:  # Ray's log is still in its files, and failures are still raised
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", module=r"ray\.")
    leaving = threading.Thread(target=ray.shutdown)
    with resources or contextlib.ExitStack() as at_the_end:
        if resources is None:
            cluster = at_the_end.enter_context(_new_connection(config, forking, meanwhile, leaving, **options))
        else:
            prepare_local()
            meanwhile()
            cluster = _describe(is_local=True)
        keeps = cluster.is_local and kept.is_wanted()
        with watched() as stop_watching:

            def leave() -> None:
                stop_watching()
                if not keeps:
                    leaving.start()

            yield dataclasses.replace(cluster, leave=leave)
        if keeps:
            everything = contextlib.ExitStack()
            if forking is not None:
                everything.push(forking.at_the_end.pop_all())
            everything.push(at_the_end.pop_all())
            kept.keep(everything, config, verbose=verbose)


@contextlib.contextmanager
def _new_connection(
    config: WorkerConfig,
    forking: Forking | None,
    meanwhile: Callable[[], None],
    leaving: threading.Thread,
    **options: Any,
) -> Iterator[Cluster]:
    """Join the cluster or start a local Ray. At the end, disconnect, if ``leaving`` has not begun to."""
    address, notes = _find_cluster()
    ray_internals.read_uv_setting_again()
    with contextlib.ExitStack() as at_the_end:
        at_the_end.enter_context(ray_internals.without_sigterm_handler())
        if address is not None:
            start = functools.partial(_join, address, forking, **options)
        else:
            name = f"session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}"
            with in_one_line("a local Ray cannot start"):
                session = ray_internals.default_folder() / name
            at_the_end.enter_context(removed_unless_failed(session))
            start = functools.partial(_start, session, local_cpus(config), forking, **options)
        if "working_dir" in own_runtime_env() and ray_internals.num_nodes_here() > 1:
            # On connecting, another node on this machine may replace the working directory of the job, which then
            # cannot import torch.
            meanwhile()
            meanwhile = _nothing
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(meanwhile)
            at_the_end.enter_context(_connected(start, leaving))
            cluster = _describe(is_local=address is None)
            notes += _start_worker(cluster.log_folder)
        done.result()
        yield dataclasses.replace(cluster, notes=tuple(notes))


@contextlib.contextmanager
def _own_connection(meanwhile: Callable[[], None]) -> Iterator[Cluster]:
    """Use the connection that this process has, and leave it open."""
    if ray.util.client.ray.is_connected():
        raise UsageError("this job cannot use a connection of Ray Client; run it on the cluster by ray job submit")
    if ray_internals.dead_processes():
        raise JobError("the Ray that this process has started is dead; use a new process")
    meanwhile()
    with watched():
        yield _describe(is_local=False)


def _start(session: Path, num_cpus: int, forking: Forking | None, **options: Any) -> None:
    """Start a Ray that listens on loopback only. Raises a JobError that names the logs."""
    prepare_local()
    small = ray_internals.for_one_job(forking, log_to_driver=options["log_to_driver"], session_name=session.name)
    try:
        with ray_internals.on_loopback(), small:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                runtime_env={"env_vars": for_workers()},
                _temp_dir=str(session.parent),
                **options,
            )
    except Exception as error:
        reason = about_ray(error) or first_line(error)
        reason += "; set RAY_TMPDIR to a folder with a shorter path" if "AF_UNIX path" in reason else ""
        raise JobError(f"a local Ray cannot start: {reason} (logs: {session / 'logs'})") from error


def _join(address: str, forking: Forking | None, **options: Any) -> None:
    if forking is not None:
        if forking.server is not None:  # it is for a local Ray; here, each node's first worker starts one
            forking.server.kill()
        options["runtime_env"] = runtime_env_to_fork(forking)
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        said = str(error.__cause__ or error).strip()
        reason = said.splitlines()[-1]
        if len(versions := re.findall(r"(?:Ray|Python): (\S+)", said)) == 4:
            differ = "it has Ray {} and Python {}, but this job {} and {}; install its versions, or use ray job submit"
            reason = differ.format(*versions)
        raise JobError(f"cannot connect to the Ray cluster at {address}: {reason}") from error


@contextlib.contextmanager
def _connected(start: Callable[[], None], leaving: threading.Thread) -> Iterator[None]:
    """Connect by ``start``. At the end, disconnect; if ``leaving`` has begun to do so, wait for it instead.

    Ray's own errors are reported in one line; an error in a task's code stays unchanged.
    """
    logs, disconnect = Path(), ray.shutdown
    try:
        start()
        logs = ray_internals.session_folder() / "logs"
        yield
    except RaySilentError as error:
        # While a part is silent, ray.shutdown would wait for its answer. Once one has died, Ray ends this process some
        # seconds later if it is still connected, even if a call from Python has caught the error.
        disconnect = _disconnect_soon if error.has_died else _nothing
        if not error.has_died and kept.is_wanted():
            error.hints += "; Ray may end this process within a minute"
        raise
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        raise JobError(f"Ray failed: {type(error).__name__}: {first_line(error)} (logs: {logs})") from error
    finally:
        if leaving.ident is not None:
            leaving.join()
        elif logs == Path() or ray_internals.is_connected_to(logs.parent):  # else the user has connected to another one
            disconnect()


@contextlib.contextmanager
def removed_unless_failed(session: Path) -> Iterator[None]:
    """Remove a local Ray's files, unless something failed: logs are needed, and may tell a limit that was reached."""
    has_failed = False
    try:
        yield
    except Exception as error:
        has_failed, log = not isinstance(error, UsageError), session / "logs" / "raylet.err"
        if isinstance(error, JobError) and log.exists() and (limit := about_limit(log.read_text(errors="replace"))):
            error.hints += f"; {limit}"
        raise
    finally:
        if not has_failed:
            shutil.rmtree(session, ignore_errors=True)
            latest = session.with_name("session_latest")  # Ray makes this link, but never replaces a dangling one
            with contextlib.suppress(OSError):  # the link is missing, or another Ray has replaced it
                if os.readlink(latest) == str(session):
                    latest.unlink()


def _start_worker(log_folder: str) -> list[str]:
    """Start a worker on this node; the first actor takes the worker over. Return notes for the user.

    Raises JobError if no worker starts. Ray itself would try five times, and wait for a minute each time.
    """
    started = ray.remote(num_cpus=0, scheduling_strategy=this_node())(has_been_silent).remote()
    try:
        is_slow = ray.get(started, timeout=_WORKER_START_TIMEOUT_S)
        return ["workers start slowly: the fork server does not answer (--fork-workers no)"] if is_slow else []
    except ray.exceptions.GetTimeoutError as error:
        log = Path(log_folder) / "raylet.err"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line and not line.startswith("[")]
        last = f"; a worker's last line: {lines[-1]}" if lines else ""
        raise JobError(f"Ray's worker processes do not start{last} (log: {log})") from error


def _disconnect_soon() -> None:
    """Disconnect from a Ray of which a part has died, but wait for that only briefly."""
    wait([in_thread(ray.shutdown)], _DISCONNECT_TIMEOUT_S)


def _nothing() -> None:
    """Do nothing."""


def this_node() -> NodeAffinitySchedulingStrategy:
    """Return the strategy that puts an actor on this process's node: losing another node does not end the actor."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _find_cluster() -> tuple[str | None, list[str]]:
    """Return the address of the cluster to join, or None to start a local Ray; and notes for the user.

    ``ray.init(address="auto")`` would even join the local Ray of another job on this machine, and wait for minutes for
    a cluster that has ended.
    """
    named = os.environ.get("RAY_ADDRESS", "auto") or "auto"
    if named == "local":
        return None, []
    if named == "auto":
        try:
            started_here = ray_internals.address_of_ray_start()
        except OSError as error:
            reason = f"{error.filename} is ignored ({error.strerror})"
            return None, [f"{reason}: not joining a cluster; to join one, set RAY_ADDRESS=HOST:PORT"]
        return started_here if started_here and _answers(started_here) else None, []
    if "://" in named or "@" in named:
        shown = re.sub(r"[^/]*@", "***@", named)
        raise UsageError(f"RAY_ADDRESS={shown} is not HOST:PORT; for a dashboard's address, use ray job submit")
    if not _answers(named):
        raise JobError(f"no Ray cluster answers at RAY_ADDRESS={named}; unset it to start a local Ray")
    if os.geteuid() not in {0, *(ray_internals.owners_here(named) or {os.geteuid()})}:  # Ray's C++ would abort
        belongs = "belongs to another user, whose files you cannot write"
        raise JobError(f"the node of RAY_ADDRESS={named} on this machine {belongs}; use ray job submit")
    return named, []


def _answers(address: str) -> bool:
    """Return whether Ray, not another service, answers at an address. Raises JobError if Ray refuses the token."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        ray_internals.ask(address, _CONNECT_TIMEOUT_S)
    except ray.exceptions.AuthenticationError as error:
        advice = "copy the head's ~/.ray/auth_token here, set RAY_AUTH_TOKEN to its content, or RAY_ADDRESS=local"
        raise JobError(f"the Ray cluster at {address} requires the head's token; {advice}") from error
    except (OSError, ValueError, OverflowError, ray.exceptions.RayError):
        return False
    return True


def _describe(is_local: bool) -> Cluster:
    logs = ray_internals.session_folder() / "logs"
    return Cluster(is_local, current_nodes(), str(logs))


class Waiting:
    """Says, after half a minute and then every five minutes, what a job waits for, and what the cluster has free."""

    def __init__(self, needed: str, say: Callable[[str], object]) -> None:
        self._needed, self._say = needed, say
        self.look(is_waiting=False)

    def look(self, *, is_waiting: bool = True) -> None:
        """Say so if it is time; if the job does not wait now, count from now on."""
        if not is_waiting:
            self._since, self._said_after_s = time.monotonic(), _WAITING_SAID_AFTER_S
        elif (waited_s := time.monotonic() - self._since) > self._said_after_s:
            self._said_after_s = waited_s + _WAITING_SAID_EVERY_S
            there, free = ray.cluster_resources(), ray.available_resources()
            parts = [f"{free.get(name, 0):g} of {there[name]:g} {name}s" for name in ("CPU", "GPU") if name in there]
            self._say(f"waiting for {self._needed}: {' and '.join(parts)} are free ({waited_s:.0f} s)")


def current_nodes() -> tuple[Node, ...]:
    """Return the nodes that are alive now: an autoscaler adds and removes nodes."""
    return tuple(node_of(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"])
