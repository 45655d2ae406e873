"""Joins the workers through the network interface that Ray uses; on a local Ray, without an open port."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray
import ray.train
from ray.train.torch import TorchConfig, get_device
from torch import distributed as dist

from mnist_ray.cluster.devices import device_here
from mnist_ray.cluster.nodes import session_folder
from ray_fork.shim import own_folder


@dataclass
class WorkerGroupConfig(TorchConfig):
    """Joins the workers as Ray Train does, with two differences.

    By default, gloo binds to the address of the host's name, often 127.0.1.1 on Linux; here, it binds to the interface
    with the node's address in Ray. On a local Ray, workers meet through a file: Ray Train would open a ``TCPStore``,
    which listens on all interfaces.
    """

    is_local: bool = False

    @property
    def backend_cls(self) -> type:
        """The class that sets up workers, including those that replace lost workers."""
        return _Backend


_RaysBackend: Any = TorchConfig().backend_cls


class _Backend(_RaysBackend):
    def on_start(self, worker_group: Any, backend_config: WorkerGroupConfig) -> None:
        worker_group.execute(use_nodes_interface)
        worker_group.execute(device_here)  # an UnusableGPUError ends the run
        if not backend_config.is_local:
            super().on_start(worker_group, backend_config)
        elif (world_size := len(worker_group)) > 1:
            file = f"file://{_folder_of_files()}/workers-{uuid.uuid4().hex}"  # torch does not decode %20
            options = (world_size, file, backend_config.timeout_s)
            ray.get([worker_group.execute_single_async(rank, _join, rank, *options) for rank in range(world_size)])

    def on_training_start(self, worker_group: Any, backend_config: WorkerGroupConfig) -> None:
        super().on_training_start(worker_group, backend_config)
        if backend_config.is_local:
            worker_group.execute(_set_variables)


def _join(rank: int, world_size: int, file: str, timeout_s: float) -> None:
    """Join the other workers through a file, as Ray Train does through a ``TCPStore``."""
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    backend, timeout = "nccl" if ray.get_gpu_ids() else "gloo", timedelta(seconds=timeout_s)
    dist.init_process_group(backend, init_method=file, rank=rank, world_size=world_size, timeout=timeout)


def _set_variables() -> None:
    """Set the variables that Ray Train sets: torchrun's, and Hugging Face Accelerate's."""
    context = ray.train.get_context()
    os.environ["RANK"] = str(context.get_world_rank())
    os.environ["WORLD_SIZE"] = str(context.get_world_size())
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    os.environ["LOCAL_WORLD_SIZE"] = str(context.get_local_world_size())
    os.environ["NODE_RANK"] = str(context.get_node_rank())
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(get_device())


def _folder_of_files() -> str:
    """Return a folder that no other user can write to: the content of the file is unpickled.

    The session folder is removed with its content, but RAY_TMPDIR may have put it anywhere.
    """
    session, own = session_folder(), own_folder("mnist_ray")
    return str(session) if session.is_relative_to(own) else own


def use_nodes_interface() -> None:
    """Let gloo and NCCL use the network interface of this node's address, unless the user has set one."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without =, eth1 would also match eth10
