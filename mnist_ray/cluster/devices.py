"""Whether PyTorch can use the GPUs that Ray counts: Ray asks only the GPU's driver."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable

import ray
import torch

from mnist_ray.cluster.plan import Cluster
from mnist_ray.errors import TrainingStoppedError, first_line
from mnist_ray.provenance import cpuinfo


def device_here() -> torch.device:
    """Return the GPU that Ray gave this task or actor; without one, the CPU. Raises like ``usable``."""
    if not (ids := ray.get_gpu_ids()):
        return torch.device("cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return usable(torch.device("cuda", visible.index(str(ids[0])) if str(ids[0]) in visible else 0))


def usable(device: torch.device) -> torch.device:
    """Return ``device`` if PyTorch can compute on it.

    Raises TrainingStoppedError if PyTorch was built without CUDA or for other GPUs, or the driver is too old.
    """
    try:
        torch.ones(1, device=device).add_(1).item()
    except (AssertionError, RuntimeError) as error:
        remedy = "install a PyTorch that fits the GPU and its driver, or use --use-gpu no"
        found = f"PyTorch on {socket.gethostname()} cannot use the GPU: {first_line(error)}"
        raise TrainingStoppedError(f"{found}; {remedy}") from error
    return device


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
