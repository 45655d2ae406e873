"""Connects to Ray: joins a cluster, or starts a local Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import ray

from mnist_ray import extras, network
from mnist_ray.cluster import nodes
from mnist_ray.cluster.connection import about_access, connected, join, start_local, start_worker
from mnist_ray.cluster.plan import Cluster
from mnist_ray.cluster.session_files import removed_unless_failed, sessions_folder
from mnist_ray.cluster.watch import watched
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import JobError, UsageError
from mnist_ray.process import in_thread
from mnist_ray.signals import end_with
from mnist_ray.storage import in_one_line
from ray_fork.starting import Forking, own_runtime_env


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
            notes += start_worker(cluster.log_folder) + (about_access() if cluster.is_local else [])
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
