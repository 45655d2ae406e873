"""The ``TorchTrainer`` of a run, or of a sweep's trial.

It joins the workers through the network interface that Ray uses; on a local Ray, without an open port.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch import distributed as dist

from mnist_ray import extras
from mnist_ray.cluster.devices import device_here
from mnist_ray.cluster.nodes import session_folder
from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.run.ray_worker import train_loop_per_worker
from mnist_ray.run.worker import LoopSpec
from ray_fork.shim import own_folder

_RESIZE_INTERVAL_S = 15.0  # between an elastic run's checks whether the cluster has room for more workers


def create_trainer(
    spec: LoopSpec, plan: WorkerPlan, folder: str, max_failures: int, callbacks: Sequence[UserCallback] = ()
) -> TorchTrainer:
    """Return the trainer that runs ``spec`` on the planned workers.

    Ray Train is told no checkpoint; what it writes all the same goes to a private ``folder`` of this node.
    """
    # How often Train's controller checks its workers, and sees that they have ended; the default is 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    extra = extras.load("trainer", plain=spec.job.workers.plain_ray)
    trainer_class: type[TorchTrainer] = extra.Trainer if extra else TorchTrainer
    is_elastic, scaling = plan.min_workers is not None, dict[str, Any]()
    if is_elastic:
        scaling["elastic_resize_monitor_interval_s"] = _RESIZE_INTERVAL_S
    if plan.labels:
        scaling["label_selector"] = dict(plan.labels)
    return trainer_class(
        train_loop_per_worker,
        train_loop_config={"spec": spec},
        torch_config=WorkerGroupConfig(is_local=plan.is_local),
        scaling_config=ScalingConfig(
            num_workers=(plan.min_workers, plan.num_workers) if is_elastic else plan.num_workers,
            placement_strategy=plan.placement,
            use_gpu=plan.use_gpu,
            resources_per_worker={"CPU": plan.cpus_per_worker, **({"GPU": 1} if plan.use_gpu else {})},
            **scaling,
        ),
        run_config=RunConfig(
            name=spec.job.run.name,
            storage_path=folder,
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[*callbacks],
        ),
    )


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
