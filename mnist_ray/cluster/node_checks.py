"""Checks that the nodes of a cluster can take part in a job."""

from __future__ import annotations

import contextlib
import socket
import uuid

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_ray.cluster.devices import UnusableGPUError, device_here
from mnist_ray.cluster.plan import WorkerPlan, node_of, suitable
from mnist_ray.errors import JobError, first_line
from mnist_ray.provenance import versions
from mnist_ray.storage import STORAGE_ERRORS, RunFolder
from ray_fork.starting import has_own_python

_TIMEOUT_S, _INSTALLING_TIMEOUT_S = 60.0, 900.0  # the second if nodes first install packages


def check_nodes(run: RunFolder, plan: WorkerPlan, own_versions: dict[str, str] | None = None) -> list[str]:
    """Let every node for workers read a file that the driver writes next to the run; return the nodes' hosts.

    If the driver's ``own_versions`` are given, each node also compares its versions and, if the workers use GPUs, tries
    one. Raises JobError if a node's versions differ, it cannot read the file, or PyTorch cannot use its GPU.
    """
    probe = f".probe-{uuid.uuid4().hex}"
    run.storage.write_text(probe, probe)  # the content is the name
    answers, checked = [], list[tuple[str, str]]()
    for node in ray.nodes():
        if not node["Alive"] or not suitable([node_of(node["Resources"], node["Labels"])], plan.labels):
            continue
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        num_gpus = int(own_versions is not None and plan.use_gpu and "GPU" in node["Resources"])
        task = ray.remote(num_cpus=0, num_gpus=num_gpus, scheduling_strategy=place)(check_here)
        answers.append(task.remote(run, probe, own_versions or {}))
    timeout_s = _INSTALLING_TIMEOUT_S if has_own_python() else _TIMEOUT_S
    try:
        ray.wait(answers, num_returns=len(answers), timeout=timeout_s)
        for answer in answers:
            with contextlib.suppress(ray.exceptions.TaskUnschedulableError):  # its node has left the cluster
                checked.append(ray.get(answer, timeout=0))
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
    try:
        device_here()
    except UnusableGPUError as error:
        problem = problem or f"has a GPU, but {error}"
    return socket.gethostname(), problem
