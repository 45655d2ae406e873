"""The nodes of the Ray that this process is connected to, and what a job waits for."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_ray.cluster.plan import Cluster, node_of


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
