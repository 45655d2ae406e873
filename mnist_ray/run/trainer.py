"""The ``TorchTrainer`` of a run, or of a sweep's trial.

It joins the workers through the network interface that Ray uses; on a local Ray, without an open port.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch import distributed as dist

from mnist_ray import extras
from mnist_ray.cluster.devices import device_here
from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.run.failures import FailureCallback
from mnist_ray.run.ray_worker import train_loop_per_worker
from mnist_ray.run.worker import LoopSpec

_RESIZE_INTERVAL_S = 15.0  # between an elastic run's checks whether the cluster has room for more workers


def create_trainer(spec: LoopSpec, plan: WorkerPlan, folder: str) -> TorchTrainer:
    """Return the trainer that runs ``spec`` on the planned workers.

    ``folder``: a private one of this node. On a local Ray, workers meet in it; and Ray Train, which is told no
    checkpoint, writes there what it writes all the same.
    """
    # How often Train's controller checks its workers, and sees that they have ended; the default is 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    workers = spec.job.workers
    extra = extras.load("trainer", plain=workers.plain_ray)
    trainer_class: type[TorchTrainer] = extra.Trainer if extra else TorchTrainer
    since_later: dict[str, Any] = {}  # what only newer versions of Ray take
    if plan.min_workers is not None:
        since_later["elastic_resize_monitor_interval_s"] = _RESIZE_INTERVAL_S
    return trainer_class(
        train_loop_per_worker,
        train_loop_config={"spec": spec},
        torch_config=WorkerGroupConfig(folder=folder if plan.is_local else None),
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers if plan.min_workers is None else (plan.min_workers, plan.num_workers),
            use_gpu=plan.use_gpu,
            resources_per_worker={"CPU": plan.cpus_per_worker, "GPU": int(plan.use_gpu)},
            **since_later,
        ),
        run_config=RunConfig(
            name=spec.job.run.name,
            storage_path=folder,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            callbacks=[FailureCallback(spec.event_queue)],
        ),
    )


@dataclass
class WorkerGroupConfig(TorchConfig):
    """Joins the workers as Ray Train does, with two differences.

    By default, gloo binds to the address of the host's name, often 127.0.1.1 on Linux; here, it binds to the interface
    with the node's address in Ray. On a local Ray, workers meet through a file: Ray Train would open a ``TCPStore``,
    which listens on all interfaces.
    """

    folder: str | None = None  # of a local Ray: the file's, where no other user can write, since it is unpickled

    @property
    def is_local(self) -> bool:
        """Whether all workers are on this machine."""
        return self.folder is not None

    @property
    def backend_cls(self) -> type:
        """The class that sets up workers, including those that replace lost workers."""
        return _Backend


_RaysBackend: Any = TorchConfig().backend_cls


class _Backend(_RaysBackend):
    def on_start(self, worker_group: Any, backend_config: WorkerGroupConfig) -> None:
        worker_group.execute(use_nodes_interface)
        worker_group.execute(device_here)  # an unusable GPU ends the run
        if not backend_config.is_local:
            super().on_start(worker_group, backend_config)
        elif (world_size := len(worker_group)) > 1:
            file = f"file://{backend_config.folder}/workers-{uuid.uuid4().hex}"  # torch does not decode %20
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


def use_nodes_interface() -> None:
    """Let gloo and NCCL use the network interface of this node's address, unless the user has set one."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without =, eth1 would also match eth10
