"""Whether a job would run: what the nodes have, see and are, found out before anything is trained."""

from __future__ import annotations

import math
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_ray.cluster.plan import WorkerPlan, node_of, usable_cores
from mnist_ray.errors import JobError, count, first_line
from mnist_ray.provenance import cpu_has_bf16, versions
from mnist_ray.storage import STORAGE_ERRORS, RunFolder

_PROBE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class NodeReport:
    """What one node says."""

    host: str
    versions: dict[str, str]
    fingerprint: str
    """Of the training data as this node gets them."""
    storage_error: str | None
    """Why it cannot read what the driver has written."""
    num_cores: int
    has_bf16: bool


def check_storage(run: RunFolder) -> None:
    """Let every node read a file that the driver writes beside the run. Raises JobError where one cannot.

    Only asked where there are several nodes: else nobody but this machine writes.
    """
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    for host, problem in _with_probe(run, lambda probe: _on_nodes(nodes, _read_probe, run, probe)):
        if problem is not None:
            raise JobError(_unseen(host, run, problem))


def check_nodes(
    run: RunFolder,
    data: Any,
    fingerprint: str,
    noun: str,
    batch_size: int,
    plan: WorkerPlan,
    say: Callable[[str, str], None],
) -> None:
    """Say how a job would run, and let every node prove that it can. Raises JobError where it would not.

    Compares versions and the training data on all nodes with the driver's own, and lets each read a probe on storage.
    ``data`` gives a node its training data by ``data.open()``; ``fingerprint`` is that of the driver's.
    """
    nodes = {node["NodeID"]: node_of(node["Resources"]) for node in ray.nodes() if node["Alive"]}
    reports = _with_probe(run, lambda probe: _on_nodes(list(nodes), _report, run, probe, data))
    own_versions = versions()
    for report in reports:
        if report.storage_error is not None:
            raise JobError(_unseen(report.host, run, report.storage_error))
        for name, version in report.versions.items():
            if version != own_versions[name]:
                raise JobError(f"node {report.host} has {name} {version}, the driver has {own_versions[name]}")
        if report.fingerprint != fingerprint:
            raise JobError(f"node {report.host} has other training {noun}s than the driver")
    for report, node in zip(reports, nodes.values(), strict=True):
        room = min(node.num_cpus // plan.cpus_per_worker, node.num_gpus if plan.use_gpu else plan.num_workers)
        bf16 = "bf16 in hardware" if report.has_bf16 else "no bf16 in hardware"
        cpus = f"{count(node.num_cpus, 'CPU')} on {count(report.num_cores, 'core')}"
        say("node", f"{report.host}: {cpus}, {bf16}, room for {count(room, 'worker')}")
    share = f"{math.ceil(batch_size / plan.num_workers)} a worker"
    say("plan", f"{count(plan.num_workers, 'worker')} ({plan.placement}); a step's {batch_size} {noun}s are {share}")
    say(f"{noun}s", f"the same on every node, SHA-256 {fingerprint[:16]}…")
    say("storage", f"{run.storage_path}: read by every node")
    say("versions", ", ".join(f"{name} {version}" for name, version in own_versions.items()))
    if plan.must_scale_up:
        say("note", "whether the cluster can start nodes for these workers is only seen when it is asked to")
    say("check", "this job would run")


def _with_probe(run: RunFolder, ask: Callable[[str], list]) -> list:
    """Ask something while a probe lies on the storage; its content is the name."""
    name = f".probe-{uuid.uuid4().hex}"
    run.storage.write_text(name, name)
    try:
        return ask(name)
    finally:
        run.storage.delete_file(name)


def _on_nodes(nodes: list[str], function: Callable, *arguments: object) -> list:
    """Run a task on each node; return what they say, in the nodes' order. Raises JobError where one does not answer."""
    task = ray.remote(num_cpus=0)(function)
    asked = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*arguments)
        for node in nodes
    ]
    try:
        return ray.get(asked, timeout=_PROBE_TIMEOUT_S)
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
        raise JobError(f"a node does not answer: {first_line(error)}") from error


def _read_probe(run: RunFolder, name: str) -> tuple[str, str | None]:
    try:
        found = run.storage.read_text(name)
    except STORAGE_ERRORS as error:
        return socket.gethostname(), first_line(error)
    return socket.gethostname(), None if found == name else "what the driver has written is not there"


def _report(run: RunFolder, name: str, data: Any) -> NodeReport:
    host, storage_error = _read_probe(run, name)
    return NodeReport(host, versions(), data.open().fingerprint(), storage_error, usable_cores(), cpu_has_bf16())


def _unseen(host: str, run: RunFolder, problem: str) -> str:
    return f"node {host} does not see --storage-path {run.storage_path}: {problem}; use one that all nodes share"
