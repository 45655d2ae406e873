"""Whether every node can take part in a job: it reads what the driver writes, and has the driver's versions."""

from __future__ import annotations

import socket
import uuid

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_ray.errors import JobError, first_line
from mnist_ray.provenance import versions
from mnist_ray.storage import STORAGE_ERRORS, RunFolder

_TIMEOUT_S = 60.0


def check_nodes(run: RunFolder, own_versions: dict[str, str] | None = None) -> list[str]:
    """Let every node read a file that the driver writes beside the run, and compare versions; return the hosts.

    ``own_versions``: see ``versions``. Without them they are not compared. Raises JobError where something differs.
    """
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    probe = f".probe-{uuid.uuid4().hex}"
    run.storage.write_text(probe, probe)  # the content is the name
    try:
        reports = [_on_node(node).remote(run, probe) for node in nodes]
        found = ray.get(reports, timeout=_TIMEOUT_S)
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
        raise JobError(f"a node does not answer: {first_line(error)}") from error
    finally:
        run.storage.delete_file(probe)
    for host, its_versions, problem in found:
        if problem is not None:
            place = f"--storage-path {run.storage_path}"
            raise JobError(f"node {host} does not see {place}: {problem}; use one that all nodes share")
        for name, version in (own_versions or {}).items():
            if its_versions[name] != version:
                raise JobError(f"node {host} has {name} {its_versions[name]}, the driver has {version}")
    return [host for host, _, _ in found]


def _on_node(node: str) -> ray.remote_function.RemoteFunction:
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=strategy)(report)


def report(run: RunFolder, probe: str) -> tuple[str, dict[str, str], str | None]:
    """Return this node's name, its versions, and why it cannot read what the driver has written, if it cannot."""
    host = socket.gethostname()
    try:
        found = run.storage.read_text(probe)
    except (JobError, *STORAGE_ERRORS) as error:
        return host, versions(), first_line(error)
    return host, versions(), None if found == probe else "what the driver has written is not there"
