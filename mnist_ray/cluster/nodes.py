"""The nodes of the Ray that this process is connected to: their check, and what a job waits for."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_ray.cluster.plan import Cluster, node_of
from mnist_ray.errors import JobError, first_line
from mnist_ray.provenance import versions
from mnist_ray.storage import STORAGE_ERRORS, RunFolder
from ray_fork.starting import has_own_python

_CHECK_TIMEOUT_S = 60.0
_INSTALLING_TIMEOUT_S = 900.0  # of a check, if nodes first install packages


def current_cluster(*, is_local: bool) -> Cluster:
    """Return the Ray that this process is connected to, with the nodes that are alive now."""
    alive = tuple(node_of(node["Resources"]) for node in ray.nodes() if node["Alive"])
    return Cluster(is_local, alive, str(session_folder() / "logs"))


def this_node() -> NodeAffinitySchedulingStrategy:
    """Return the strategy that puts an actor on this process's node, so that it survives the loss of another node."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def session_folder() -> Path:
    """Return the session folder of this node's Ray; it contains the logs."""
    own = ray.get_runtime_context().get_node_id()
    (socket,) = [node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == own]
    return Path(socket).parent.parent


@contextlib.contextmanager
def temporary_folder() -> Iterator[str]:
    """Yield a folder on this node: inside Ray's session, which takes it along if this process is killed."""
    session = session_folder()
    with tempfile.TemporaryDirectory(prefix="mnist_ray-", dir=session if os.access(session, os.W_OK) else None) as name:
        yield name


_SAID_AFTER_S, _SAID_EVERY_S = 30.0, 300.0  # a start takes up to 20 s


class Waiting:
    """Reports, after 30 s and then every 5 min, what a job waits for and which resources are unreserved."""

    def __init__(self, needed: str, say: Callable[[str], object]) -> None:
        self._needed, self._say = needed, say
        self.look(is_waiting=False)

    def look(self, *, is_waiting: bool = True) -> None:
        """Report the wait if it is time; if the job does not wait now, restart the clock."""
        if not is_waiting:
            self._since, self._said_after_s = time.monotonic(), _SAID_AFTER_S
        elif (waited_s := time.monotonic() - self._since) > self._said_after_s:
            self._said_after_s = waited_s + _SAID_EVERY_S
            there, free = ray.cluster_resources(), ray.available_resources()
            parts = [f"{free.get(name, 0):g} of {there[name]:g} {name}s" for name in ("CPU", "GPU") if name in there]
            self._say(f"waiting for {self._needed}: {' and '.join(parts)} are unreserved ({waited_s:.0f} s)")


def check_nodes(run: RunFolder, own_versions: dict[str, str] | None = None) -> list[str]:
    """Let every node read a file that the driver writes next to the run; return the nodes' hosts.

    If the driver's ``own_versions`` are given, each node also compares its versions. Raises JobError if they differ, or
    if a node cannot read the file.
    """
    probe = f".probe-{uuid.uuid4().hex}"
    run.storage.write_text(probe, probe)  # the content is the name
    answers = []
    for node in ray.nodes():
        if node["Alive"]:
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0, scheduling_strategy=place)(check_here)
            answers.append(task.remote(run, probe, own_versions or {}))
    try:
        checked = ray.get(answers, timeout=_INSTALLING_TIMEOUT_S if has_own_python() else _CHECK_TIMEOUT_S)
    except ray.exceptions.RayError as error:
        raise JobError(f"a node does not answer: {first_line(error)}") from error
    finally:
        with contextlib.suppress(*STORAGE_ERRORS):
            run.storage.delete_file(probe)
    for host, problem in checked:
        if problem:
            raise JobError(f"node {host} {problem}")
    return [host for host, _ in checked]


def check_here(run: RunFolder, probe: str, drivers: dict[str, str]) -> tuple[str, str]:
    """Return this node's host and its problem, if any: it does not see the driver's file, or its versions differ."""
    try:
        problem = "" if run.storage.read_text(probe) == probe else "the driver's file is missing"
    except (JobError, *STORAGE_ERRORS) as error:
        problem = first_line(error)
    if problem:
        problem = f"does not see --storage-path {run.storage_path}: {problem}; use a path that all nodes share"
    for name, version in versions().items():
        own, drivers_own = (text.partition("+")[0] for text in (version, drivers.get(name, version)))
        if not problem and own != drivers_own:  # a local part, such as +cu128, only names torch's GPUs
            problem = f"has {name} {version}, the driver has {drivers[name]}"
    return socket.gethostname(), problem
