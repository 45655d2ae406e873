"""A run on Ray Train: its ``TorchTrainer``, how workers join each other, and the function that each worker calls."""

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
from ray.train.torch import TorchConfig, TorchTrainer
from torch import distributed as dist

from mnist_ray import extras
from mnist_ray.cluster.devices import device_here
from mnist_ray.cluster.nodes import this_node
from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.parallel.group import Group
from mnist_ray.ray_versions import preemption_info
from mnist_ray.run.failures import FailureCallback, code_failures_placed
from mnist_ray.run.worker import LoopSpec, Sink, train_worker
from mnist_ray.training.callback import Callback
from mnist_ray.training.events import Event, Note, Outcome, Progress
from mnist_ray.training.metrics import TrainingDivergedError
from mnist_ray.training.state import StopWantedError, TrainingState

_RESIZE_INTERVAL_S = 15.0  # between an elastic run's checks whether the cluster has room for more workers
_ASK_INTERVAL_S = 5.0  # of training, between two checks for preempted nodes: every tenth window


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
    is_elastic = plan.min_workers is not None
    elastic: Any = {"elastic_resize_monitor_interval_s": _RESIZE_INTERVAL_S} if is_elastic else {}  # not in older Rays
    return trainer_class(
        train_loop_per_worker,
        train_loop_config={"spec": spec},
        torch_config=WorkerGroupConfig(folder=folder if plan.is_local else None),
        scaling_config=ScalingConfig(
            num_workers=(plan.min_workers, plan.num_workers) if is_elastic else plan.num_workers,
            use_gpu=plan.use_gpu,
            resources_per_worker={"CPU": plan.cpus_per_worker, "GPU": int(plan.use_gpu)},
            **elastic,
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
    def backend_cls(self) -> type:
        """The class that sets up workers, including those that replace lost workers."""
        return _Backend


_RaysBackend: Any = TorchConfig().backend_cls


class _Backend(_RaysBackend):
    def on_start(self, worker_group: Any, backend_config: WorkerGroupConfig) -> None:
        worker_group.execute(use_nodes_interface)
        worker_group.execute(device_here)  # an unusable GPU ends the run
        if backend_config.folder is None:
            super().on_start(worker_group, backend_config)
        elif (world_size := len(worker_group)) > 1:
            file = f"file://{backend_config.folder}/workers-{uuid.uuid4().hex}"  # torch does not decode %20
            options = (world_size, file, backend_config.timeout_s)
            ray.get([worker_group.execute_single_async(rank, _join, rank, *options) for rank in range(world_size)])


def _join(rank: int, world_size: int, file: str, timeout_s: float) -> None:
    """Join the other workers through a file, as Ray Train does through a ``TCPStore``."""
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    backend, timeout = "nccl" if ray.get_gpu_ids() else "gloo", timedelta(seconds=timeout_s)
    dist.init_process_group(backend, init_method=file, rank=rank, world_size=world_size, timeout=timeout)


def use_nodes_interface() -> None:
    """Let gloo and NCCL use the network interface of this node's address, unless the user has set one."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without =, eth1 would also match eth10


def train_loop_per_worker(loop_config: dict[str, LoopSpec]) -> None:
    """Train on one worker of Ray Train; every rank calls this. Rank 0 reports to the driver's event queue how it ended.

    Raises TrainingStoppedError if the code has a bug; other failures unchanged. If the loss is not finite, returns.
    """
    spec, outcome = loop_config["spec"], Outcome()
    context = ray.train.get_context()
    group = Group(context.get_world_rank(), context.get_world_size(), device_here())
    sink = QueueSink(spec.event_queue, group.rank)
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    policies = [] if spec.is_local else [Preemption(sink)]
    try:
        with code_failures_placed(*spec.job.code_folders):
            train_worker(spec, group, sink, cpus, context.get_local_world_size(), policies)
    except TrainingDivergedError as error:
        outcome = Outcome(diverged=error)
    except StopWantedError:
        outcome = Outcome(is_stopped=True)
    sink.send(outcome)


class EventQueue:
    """Keeps events until the driver takes them. It is an actor, so neither side waits for the other."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._is_stop_requested = False

    def put(self, event: Event) -> bool:
        """Keep an event; return whether the training must stop."""
        self._events.append(event)
        return self._is_stop_requested

    def take(self) -> list[Event]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    def request_stop(self) -> None:
        """From now on, let ``put`` return that training must stop."""
        self._is_stop_requested = True


def open_event_queue() -> Any:
    """Create an event queue on this node, so that it survives the loss of other nodes; return its actor."""
    return ray.remote(num_cpus=0, scheduling_strategy=this_node())(EventQueue).remote()


class QueueSink(Sink):
    """Puts the events of rank 0 into the driver's queue. The other ranks send nothing."""

    def __init__(self, event_queue: Any, rank: int) -> None:
        self._put = event_queue.put.remote if rank == 0 else None
        self._answers: list[Any] = []

    def send(self, event: Event) -> None:
        """On rank 0, send an event to the driver; after the last one, wait until all are in the queue."""
        if self._put is not None:
            self._answers.append(self._put(event))
            if isinstance(event, Outcome):  # a short training may end before the queue's process starts
                ray.wait(self._answers, num_returns=len(self._answers))

    def stop_requested(self) -> bool:
        """Return whether the driver has answered that the training must stop."""
        if not self._answers:
            return False
        answered, self._answers = ray.wait(self._answers, num_returns=len(self._answers), timeout=0)
        return any(ray.get(answered))


class Preemption(Callback):
    """Saves a checkpoint when Ray announces that a worker's node will be preempted."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._trained_s = self._next_question_s = 0.0
        self._saved_for: set[str] = set()  # nodes

    def on_progress(self, state: TrainingState, progress: Progress) -> None:
        """Note the time."""
        self._trained_s = state.finished_s + state.epoch_s  # by rank 0's clock, which all ranks know

    def wants_checkpoint(self) -> bool:
        """Ask Ray every five seconds; all ranks ask together, and wait for each other."""
        if self._trained_s < self._next_question_s:
            return False
        self._next_question_s = self._trained_s + _ASK_INTERVAL_S
        info = preemption_info()
        if info is None or self._saved_for.issuperset(info.preempted_node_ids):
            return False
        self._saved_for.update(info.preempted_node_ids)
        self._sink.send(Note("a worker's node will be preempted; saving a checkpoint"))
        return True
