"""Ray: starting it or connecting to it, and planning workers on what it has."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
import os
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.utils import read_ray_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_ray.config import WorkerConfig
from mnist_ray.display.console import count
from mnist_ray.environment import for_workers, prepare_local, take_sigterm_as_interrupt
from mnist_ray.errors import JobError, UsageError

_MOST_WORKERS_A_CORE = 8  # each worker is a process of some 500 MiB
_LEAST_IMAGES_PER_THREAD = 8  # two threads are 1.35 times as fast as one at batch 16, and slower, at times, at batch 8


@dataclass(frozen=True)
class Node:
    """What one node offers in all, whoever uses it now."""

    num_cpus: int
    num_gpus: int = 0


@dataclass(frozen=True)
class Cluster:
    """A running Ray."""

    is_local: bool
    """Started by this job, on this machine, and ended with it."""
    nodes: tuple[Node, ...]
    log_folder: str
    leave: Callable[[], None] = lambda: None
    """Begin to disconnect, and to end a local Ray, while the caller does what needs no Ray any more."""

    def as_it_is_now(self) -> Cluster:
        """Return it with the nodes that are there by now: an autoscaler starts and ends some."""
        return dataclasses.replace(self, nodes=_nodes())


@dataclass(frozen=True)
class WorkerPlan:
    """How many workers, with what each."""

    num_workers: int
    cpus_per_worker: int
    use_gpu: bool
    must_scale_up: bool
    """The nodes that are there cannot hold them; the autoscaler has to start more."""
    min_workers: int | None = None
    """With how few it goes on while there are not enough nodes; None: with all or none."""
    placement: str = "PACK"
    is_local: bool = False
    """All workers are on this machine, and nothing of theirs is to be reached from another."""


def usable_cores() -> int:
    """Return the cores that this process may use, by its affinity and its cgroup's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or no quota ("max")
        pass
    return cores


@contextlib.contextmanager
def connect(config: WorkerConfig, *, verbose: bool, importing: str | None = None) -> Iterator[Cluster]:
    """Connect to the cluster of ``RAY_ADDRESS`` or of this machine's ``ray start``, else start a local Ray.

    A connection that this process has already is used and left open.
    A local Ray counts at least the CPUs asked for, so that more workers than cores can run. On leaving, the
    connection is closed and a local Ray ended. Raises JobError where the named cluster does not answer.

    ``importing`` is a module that is imported while a local Ray starts, which is mostly waiting, or else before.
    """
    if ray.is_initialized():
        yield _describe(is_local=False)
        return
    options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
    }
    if not verbose:
        quiet_ray()
    address = _find_cluster()
    try:
        if address is None:
            with _importing(importing):
                _start_local(config, options)
        else:
            # Not meanwhile: as a job connects, a second node on this machine may lay the job's working directory
            # anew, and without a current directory torch cannot be imported.
            if importing:
                importlib.import_module(importing)
            _init(address, options)
        take_sigterm_as_interrupt()
        yield _describe(is_local=address is None, leave=threading.Thread(target=ray.shutdown).start)
    finally:
        ray.shutdown()


def _start_local(config: WorkerConfig, options: dict[str, Any]) -> None:
    num_cpus = _local_cpus(config)
    prepare_local()
    with _on_loopback():
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            runtime_env={"env_vars": for_workers()},
            **options,
        )


@contextlib.contextmanager
def _importing(module: str | None) -> Iterator[None]:
    """Import a module meanwhile. It is whole afterwards: of two threads that import it, one may find it half-made."""
    thread = threading.Thread(target=importlib.import_module, args=(module,)) if module else None
    if thread:
        thread.start()
    try:
        yield
    finally:
        if thread:
            thread.join()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a Ray that is started meanwhile listen on loopback only, as Ray does by itself on macOS and Windows."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False  # what RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 sets, which is read at import
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def this_node() -> NodeAffinitySchedulingStrategy:
    """Return the strategy that puts an actor beside this process, so that it does not go with another node."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def quiet_ray() -> None:
    """Keep Ray's own log off the console; it stays in its files."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial's traceback; the reason is shown
    warnings.filterwarnings("ignore", module=r"ray\.")


def _local_cpus(config: WorkerConfig) -> int:
    """Return the CPUs that a local Ray counts. Raises UsageError where no machine of these cores could bear it."""
    cores, asked = usable_cores(), (config.num_workers or 1) * (config.cpus_per_worker or 1)
    if asked > cores * _MOST_WORKERS_A_CORE:
        workers = f"{count(config.num_workers or 1, 'worker')} of {count(config.cpus_per_worker or 1, 'CPU')}"
        raise UsageError(
            f"{workers} are too many for this machine's {count(cores, 'core')}; "
            f"lower --num-workers (to {cores}, to be fast) or --cpus-per-worker"
        )
    return max(cores, asked)


def _init(address: str, options: dict[str, Any]) -> None:
    """Connect to a cluster. Raises JobError where it does not let us in."""
    # Where there is a token, `ray start` makes the cluster ask for it; so has a client to be told to show it.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
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
        started_here = read_ray_address()  # what ``ray start`` has left
        return started_here if started_here and _answers(started_here) else None
    if "://" in named:
        raise UsageError(f"RAY_ADDRESS={named} is no HOST:PORT; for a dashboard's address, use ray job submit")
    if not _answers(named):
        raise JobError(f"no Ray cluster answers at RAY_ADDRESS={named}; unset it to start a local one")
    return named


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def _describe(is_local: bool, leave: Callable[[], None] = lambda: None) -> Cluster:
    return Cluster(is_local, _nodes(), str(session_folder() / "logs"), leave)


def _nodes() -> tuple[Node, ...]:
    return tuple(node_of(node) for node in ray.nodes() if node["Alive"])


def node_of(row: dict[str, Any]) -> Node:
    """Return what a node offers, of a row of ``ray.nodes()``."""
    return Node(int(row["Resources"].get("CPU", 0)), int(row["Resources"].get("GPU", 0)))


def session_folder() -> Path:
    """Return where this node's Ray keeps its files while it runs."""
    return Path(ray._private.worker.global_worker.node.get_session_dir_path())


def plan_workers(config: WorkerConfig, cluster: Cluster) -> WorkerPlan:
    """Decide how many workers run and what each gets.

    Raises UsageError where the nodes cannot hold the workers asked for, unless ``config.autoscaling`` says that more
    nodes will come: what an autoscaler could start, Ray does not tell.
    """
    num_gpus = sum(node.num_gpus for node in cluster.nodes)
    if config.use_gpu == "yes" and num_gpus == 0 and not config.autoscaling:
        raise UsageError("--use-gpu yes, but the cluster has no GPU; use --use-gpu no")
    use_gpu = config.use_gpu == "yes" or (num_gpus > 0 and config.use_gpu == "auto")
    usable = [node for node in cluster.nodes if (node.num_gpus if use_gpu else node.num_cpus)]
    num_workers = config.num_workers or max(1, sum(node.num_gpus for node in usable) if use_gpu else len(usable))
    if config.min_workers is not None and config.placement.startswith("STRICT"):
        raise UsageError(f"--placement {config.placement} needs a fixed --num-workers: Ray cannot do with fewer there")
    least = num_workers if config.min_workers is None else config.min_workers
    if least > num_workers:
        raise UsageError(f"--min-workers {least} is more than the {count(num_workers, 'worker')} there are to be")
    plan = functools.partial(
        WorkerPlan,
        num_workers,
        use_gpu=use_gpu,
        min_workers=config.min_workers,
        placement=config.placement,
        is_local=cluster.is_local,
    )
    for number in (num_workers, least):
        cpus = cpus_for_each(cluster.nodes, number, config.cpus_per_worker, use_gpu, config.placement)
        if cpus is not None:
            return plan(cpus_per_worker=cpus, must_scale_up=False)
    if config.autoscaling:
        return plan(cpus_per_worker=config.cpus_per_worker or 1, must_scale_up=True)
    raise UsageError(_cannot_hold(config, least, cluster, use_gpu))


def cpus_for_each(
    nodes: Sequence[Node], num_workers: int, cpus_per_worker: int | None, use_gpu: bool, placement: str = "PACK"
) -> int | None:
    """Return the CPUs of each worker: as given, else the most that all can have; None where they do not fit."""
    most = max((node.num_cpus for node in nodes), default=0)
    candidates = range(most, 0, -1) if cpus_per_worker is None else [cpus_per_worker]
    for cpus in candidates:
        rooms = [min(node.num_cpus // cpus, node.num_gpus if use_gpu else num_workers) for node in nodes]
        if placement == "STRICT_SPREAD":
            rooms = [min(room, 1) for room in rooms]
        if (max(rooms, default=0) if placement == "STRICT_PACK" else sum(rooms)) >= num_workers:
            return cpus
    return None


def _cannot_hold(config: WorkerConfig, num_workers: int, cluster: Cluster, use_gpu: bool) -> str:
    nodes = cluster.nodes
    asked = f"{count(num_workers, 'worker')} of {count(config.cpus_per_worker or 1, 'CPU')}"
    if use_gpu:
        asked += " and 1 GPU"
    there = f"{sum(node.num_cpus for node in nodes)} CPUs"
    if use_gpu:
        there += f" and {sum(node.num_gpus for node in nodes)} GPUs"
    there += f" on {count(len(nodes), 'node')}"
    if config.placement.startswith("STRICT"):
        asked += f", {config.placement}"
    flags = "--num-workers" + (" or --cpus-per-worker" if config.cpus_per_worker else "")
    advice = f"lower {flags}" + (", or use --use-gpu no" if use_gpu else "")
    if not cluster.is_local:
        advice += ", or add --autoscaling if it starts nodes on demand"
    return f"the cluster cannot hold {asked}: it has {there}; {advice}"


def threads_per_worker(assigned_cpus: float, cores: int, workers_on_node: int, local_batch_size: int) -> int:
    """Return the threads of one worker: the CPUs that Ray gave it, but no more than its share of real cores.

    Nor more than have some images each to work on: at a few a thread, waiting for each other takes what they gain.
    """
    return max(1, min(int(assigned_cpus), cores // workers_on_node, local_batch_size // _LEAST_IMAGES_PER_THREAD))
