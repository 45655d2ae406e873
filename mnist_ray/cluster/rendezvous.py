"""Joins the workers over the network interface that Ray uses; on a local Ray, without an open port."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

from mnist_ray.cluster.devices import device_here
from mnist_ray.cluster.ray_internals import session_folder
from mnist_ray.cluster.train_internals import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend
from ray_fork.shim import own_folder


@dataclass
class WorkerGroupConfig(TorchConfig):
    """Joins the workers as Ray Train does, with two differences.

    By default, gloo binds to the address of the host's name, often 127.0.1.1 on Linux. Here it binds to the interface
    with the node's address in Ray. On a local Ray the workers meet through a file; Ray Train would open a ``TCPStore``,
    which listens on all interfaces.
    """

    is_local: bool = False

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """The class that sets up workers, including those that replace lost workers."""
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: WorkerGroupConfig) -> None:
        worker_group.execute(use_nodes_interface)
        worker_group.execute(device_here)  # an UnusableGPUError ends the run
        if not backend_config.is_local:
            super().on_start(worker_group, backend_config)
            return
        worker_group.execute(_set_torch_distributed_env_vars)
        world_size = len(worker_group)
        if world_size == 1:
            return
        options = {
            "backend": backend_config.backend,
            "world_size": world_size,
            "init_method": f"file://{_own_folder()}/workers-{uuid.uuid4().hex}",  # torch decodes no %20
            "timeout_s": backend_config.timeout_s,
        }
        ray.get(
            [
                worker_group.execute_single_async(rank, _setup_torch_process_group, world_rank=rank, **options)
                for rank in range(world_size)
            ]
        )


def _own_folder() -> str:
    """Return a folder that no other user can write to: what comes over the file is unpickled.

    The session's folder is removed with what is in it, but RAY_TMPDIR may have put it anywhere.
    """
    session, own = session_folder(), own_folder("mnist_ray")
    return str(session) if session.is_relative_to(own) else own


def use_nodes_interface() -> None:
    """Let gloo and NCCL use the network interface of this node's address, unless the user has set one."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without =, eth1 would also mean eth10
