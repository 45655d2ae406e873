"""Whether nodes can take part in a job, and whether PyTorch can use their GPUs: Ray asks only the GPU's driver."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import uuid
from collections.abc import Callable

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_ray.cluster.plan import Cluster
from mnist_ray.errors import JobError, TrainingStoppedError, UsageError, first_line
from mnist_ray.provenance import cpuinfo, versions
from mnist_ray.storage import STORAGE_ERRORS, RunFolder
from ray_fork.starting import has_own_python

_TIMEOUT_S, _INSTALLING_TIMEOUT_S = 60.0, 900.0  # of a node's check; the second if nodes first install packages


class UnusableGPUError(TrainingStoppedError):
    """PyTorch cannot use this node's GPU: it was built without CUDA or for other GPUs, or the driver is too old."""


def device_here() -> torch.device:
    """Return the GPU that Ray gave this task or actor; without one, the CPU. Raises UnusableGPUError."""
    if not (ids := ray.get_gpu_ids()):
        return torch.device("cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return usable(torch.device("cuda", visible.index(str(ids[0])) if str(ids[0]) in visible else 0))


def usable(device: torch.device) -> torch.device:
    """Return ``device`` if PyTorch can compute on it; else raise UnusableGPUError."""
    try:
        torch.ones(1, device=device).add_(1).item()
    except (AssertionError, RuntimeError) as error:
        remedy = "install a PyTorch that fits the GPU and its driver, or use --use-gpu no"
        found = f"PyTorch on {socket.gethostname()} cannot use the GPU: {first_line(error)}"
        raise UnusableGPUError(f"{found}; {remedy}") from error
    return device


def is_gpu_wanted(use_gpu: str, cluster: Cluster) -> bool:
    """Return whether to use GPUs, given the setting ``use_gpu``. Raises UsageError if there are none."""
    has_gpu = any(node.num_gpus for node in cluster.nodes)
    if use_gpu == "yes" and cluster.is_local and not has_gpu:
        raise UsageError("--use-gpu yes, but this machine has no GPU; use --use-gpu no")
    return use_gpu == "yes" or (use_gpu == "auto" and has_gpu and ray.available_resources().get("GPU", 0) >= 1)


def name_of(device: torch.device) -> str:
    """Return the model of this node's processor or, for a GPU, its model and the versions of its libraries."""
    if device.type == "cpu":
        return cpuinfo("model name") or "cpu"
    name, cudnn = torch.cuda.get_device_name(device), torch.backends.cudnn.version()
    return f"{name}, CUDA {torch.version.cuda}, cuDNN {cudnn}"


def without_unusable_gpus(cluster: Cluster, warn: Callable[[str], object]) -> Cluster:
    """Return ``cluster``; if it is local and PyTorch finds none of its GPUs, ``warn``, and return it without them."""
    if not cluster.is_local or not any(node.num_gpus for node in cluster.nodes) or torch.cuda.is_available():
        return cluster
    warn("using CPUs, since PyTorch finds no CUDA GPU: it was built without CUDA, or the GPU's driver is too old")
    return dataclasses.replace(cluster, nodes=tuple(dataclasses.replace(node, num_gpus=0) for node in cluster.nodes))


def check_nodes(run: RunFolder, own_versions: dict[str, str] | None = None) -> list[str]:
    """Let every node for workers read a file that the driver writes next to the run; return the nodes' hosts.

    If the driver's ``own_versions`` are given, each node also compares its versions. Raises JobError if they differ, or
    if a node cannot read the file.
    """
    probe = f".probe-{uuid.uuid4().hex}"
    run.storage.write_text(probe, probe)  # the content is the name
    answers, checked = [], list[tuple[str, str]]()
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(num_cpus=0, scheduling_strategy=place)(check_here)
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
    return socket.gethostname(), problem
