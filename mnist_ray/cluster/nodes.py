"""The nodes of the Ray that this process is connected to."""

from __future__ import annotations

from pathlib import Path

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_ray.cluster.plan import Node, node_of


def current_nodes() -> tuple[Node, ...]:
    """Return the nodes that are alive now: an autoscaler may add and remove nodes."""
    return tuple(node_of(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"])


def this_node() -> NodeAffinitySchedulingStrategy:
    """Return the strategy that puts an actor on this process's node, so that it survives the loss of another node."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def session_folder() -> Path:
    """Return the session folder of this node's Ray; it contains the logs."""
    own = ray.get_runtime_context().get_node_id()
    (socket,) = [node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == own]
    return Path(socket).parent.parent


def num_nodes_here() -> int:
    """Return how many of Ray's nodes run on this machine, as far as this process can see."""
    return sum(process.info["name"] == "raylet" for process in psutil.process_iter(["name"]))
