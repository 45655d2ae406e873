"""How workers find each other: over the interface that Ray uses, and on a local Ray without an open port."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

from mnist_ray.cluster.ray_internals import session_folder
from mnist_ray.cluster.train_internals import (
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)


@dataclass
class WorkerGroupConfig(TorchConfig):
    """Ray Train's own way of joining workers, but for two things.

    Gloo binds to what the host's name resolves to, which on many a Linux is 127.0.1.1: here it is given the interface
    of the address by which Ray knows the node. And on a local Ray the workers meet through a file, where Ray Train
    opens a ``TCPStore``, which listens on all interfaces.
    """

    is_local: bool = False

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What sets the workers up, also whenever they were replaced."""
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: WorkerGroupConfig) -> None:
        worker_group.execute(_use_nodes_interface)
        if not backend_config.is_local:
            super().on_start(worker_group, backend_config)
            return
        worker_group.execute(_set_torch_distributed_env_vars)
        world_size = len(worker_group)
        if world_size == 1:
            return
        meeting_point = session_folder() / f"workers-{uuid.uuid4().hex}"
        joining = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend=backend_config.backend,
                world_rank=rank,
                world_size=world_size,
                init_method=meeting_point.as_uri(),
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(world_size)
        ]
        ray.get(joining)


def _use_nodes_interface() -> None:
    """Let gloo use the interface of this node's address; what the user has set stays."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """Return the network interface that has an address; None if none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            return name
    return None
