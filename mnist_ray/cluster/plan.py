"""A cluster's resources, and the plan of its workers: their number, CPUs and GPUs. Arithmetic only, without Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mnist_ray.config import WorkerConfig
from mnist_ray.errors import UsageError
from mnist_ray.process import usable_cores
from mnist_ray.text import count

_MAX_WORKERS_PER_CORE = 8  # each worker is a process of about 500 MiB
_MIN_EXAMPLES_PER_THREAD = 8  # two threads are 1.35 times as fast as one at batch 16; at batch 8, perhaps slower


@dataclass(frozen=True)
class Node:
    """One node's resources, used or not."""

    num_cpus: int
    num_gpus: int = 0

    def room(self, cpus: int, use_gpu: bool) -> int:
        """Return how many workers fit, with ``cpus`` CPUs each and, if ``use_gpu``, a GPU each."""
        return min(self.num_cpus // cpus, self.num_gpus if use_gpu else self.num_cpus)


@dataclass(frozen=True)
class Cluster:
    """A running Ray."""

    is_local: bool  # started by this job on this machine, and ended with it
    nodes: tuple[Node, ...]
    log_folder: str


@dataclass(frozen=True)
class WorkerPlan:
    """How many workers run, and the resources of each."""

    num_workers: int
    cpus_per_worker: int
    use_gpu: bool
    must_scale_up: bool  # the current nodes cannot hold the workers; the autoscaler has to start more nodes
    min_workers: int | None = None  # the minimum with which an elastic run continues; None: it needs all workers
    is_local: bool = False  # all workers are on this machine, and no other machine may reach them


def node_of(resources: Mapping[str, Any]) -> Node:
    """Return a node from its resources in ``ray.nodes()``."""
    return Node(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


def local_cpus(config: WorkerConfig) -> int:
    """Return the number of CPUs that a local Ray declares. Raises UsageError if it is far too high for this machine."""
    cores = usable_cores()
    asked = (config.num_workers or 1) * (config.cpus_per_worker or 1)
    if asked > cores * _MAX_WORKERS_PER_CORE:
        raise UsageError(
            f"{asked:,} CPUs for the workers are too many for this machine's {count(cores, 'core')}",
            fix=f"lower --num-workers (to {cores} for full speed) or --cpus-per-worker",
        )
    return max(cores, asked)


def plan_workers(config: WorkerConfig, cluster: Cluster, num_chunks: int | None = None) -> WorkerPlan:
    """Decide on the number of workers and the resources of each.

    By default, there is one worker per GPU, else one per node. ``num_chunks`` is the number of chunks of a batch with
    --reproducible: the number of workers then does not change the bits, and the default is one worker with one CPU per
    chunk, if there are enough CPUs.

    Raises UsageError if the nodes cannot hold the workers, unless ``config.autoscaling`` promises more nodes: Ray does
    not report how many an autoscaler can start.
    """
    nodes = cluster.nodes
    cpus = config.cpus_per_worker if num_chunks is None else config.cpus_per_worker or 1
    room_on_gpus = sum(node.room(cpus or 1, use_gpu=True) for node in nodes)
    use_gpu = config.use_gpu == "yes" or (config.use_gpu == "auto" and num_chunks is None and room_on_gpus > 0)
    if use_gpu:
        usual = room_on_gpus
    elif num_chunks is None:
        usual = sum(node.num_cpus > 0 for node in nodes)
    else:
        usual = min(num_chunks, sum(node.num_cpus // (cpus or 1) for node in nodes))
    number = config.num_workers or max(1, usual)
    fewest = config.min_workers or number
    if fewest > number:
        raise UsageError(f"min_workers {fewest} is more than the {count(number, 'worker')} of this run")
    found = cpus_for_each(nodes, number, cpus, use_gpu) or cpus_for_each(nodes, fewest, cpus, use_gpu)
    if found is None and not config.autoscaling:
        raise _cannot_hold(cpus or 1, fewest, nodes, use_gpu)
    return WorkerPlan(number, found or cpus or 1, use_gpu, found is None, config.min_workers, cluster.is_local)


def cpus_for_each(nodes: Sequence[Node], num_workers: int, cpus: int | None, use_gpu: bool) -> int | None:
    """Return the CPUs of each worker: the given number, or the maximum that fits; None if the workers do not fit."""
    most = max((node.num_cpus for node in nodes), default=0)
    candidates = range(most, 0, -1) if cpus is None else [cpus]
    fitting = (each for each in candidates if sum(node.room(each, use_gpu) for node in nodes) >= num_workers)
    return next(fitting, None)


def held_at_once(plan: WorkerPlan, nodes: Sequence[Node]) -> int:
    """Return how many runs with such workers the nodes hold at a time, at least one."""
    return max(1, sum(node.room(plan.cpus_per_worker, plan.use_gpu) for node in nodes) // plan.num_workers)


def _cannot_hold(cpus: int, num_workers: int, nodes: Sequence[Node], use_gpu: bool) -> UsageError:
    asked = f"{count(num_workers, 'worker')} of {count(cpus, 'CPU')}{' and 1 GPU' * use_gpu}"
    there = f"{sum(node.num_cpus for node in nodes)} CPUs and {sum(node.num_gpus for node in nodes)} GPUs"
    return UsageError(
        f"the cluster cannot hold {asked}: it has {there} on {count(len(nodes), 'node')}",
        fix="lower --num-workers or --cpus-per-worker, or add --autoscaling if the cluster starts nodes on demand"
        + ", or use --use-gpu no" * use_gpu,
    )


def threads_per_worker(assigned_cpus: float, cores: int, workers_on_node: int, local_batch_size: int) -> int:
    """Return a worker's number of threads: the CPUs that Ray gave it, but at most its share of the real cores.

    Each thread gets a minimum number of examples: with fewer, threads lose more time waiting than they save.
    """
    return max(1, min(int(assigned_cpus), cores // workers_on_node, local_batch_size // _MIN_EXAMPLES_PER_THREAD))
