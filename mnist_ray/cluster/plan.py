"""A cluster's resources, and the plan of its workers: their number, CPUs and GPUs. Arithmetic only, without Ray."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mnist_ray.config import WorkerConfig
from mnist_ray.errors import UsageError
from mnist_ray.process import usable_cores
from mnist_ray.text import count

_MAX_WORKERS_PER_CORE = 8  # each worker is a process of about 500 MiB
_MIN_EXAMPLES_PER_THREAD = 8  # two threads are 1.35 times as fast as one at batch 16; at batch 8, perhaps slower
_APPLE_CHIP = re.compile(r"accelerator_type:M\d(-(Pro|Max|Ultra))?$")


@dataclass(frozen=True)
class Node:
    """One node's resources, used or not."""

    num_cpus: int
    num_gpus: int = 0
    labels: Mapping[str, str] = field(default_factory=dict, compare=False)

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
    placement: str = "PACK"
    is_local: bool = False  # all workers are on this machine, and no other machine may reach them
    labels: Mapping[str, str] = field(default_factory=dict)  # of the nodes for workers: Ray's label selector


def node_of(resources: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> Node:
    """Return a node from its resources and labels in ``ray.nodes()``.

    Ray counts the GPU of an Apple chip, but Ray Train can assign only CUDA GPUs to workers.
    """
    is_apple = any(map(_APPLE_CHIP.match, resources))
    num_gpus = 0 if is_apple else int(resources.get("GPU", 0))
    return Node(int(resources.get("CPU", 0)), num_gpus, labels or {})


def suitable(nodes: Sequence[Node], selector: Mapping[str, str]) -> tuple[Node, ...]:
    """Return the nodes that Ray's label selector selects."""
    return tuple(node for node in nodes if all(_meets(node.labels.get(name), selector[name]) for name in selector))


def _meets(value: str | None, condition: str) -> bool:
    accepted = condition.removeprefix("!")
    values = accepted[3:-1].split(",") if accepted.startswith("in(") else [accepted]
    return (value in values) != condition.startswith("!")


def local_cpus(config: WorkerConfig) -> int:
    """Return the number of CPUs that a local Ray declares. Raises UsageError if it is far too high for this machine."""
    cores, asked = usable_cores(), (config.num_workers or 1) * (config.cpus_per_worker or 1)
    if asked > cores * _MAX_WORKERS_PER_CORE:
        raise UsageError(
            f"{_workers(config, config.num_workers or 1)} are too many for this machine's {count(cores, 'core')}; "
            f"lower --num-workers (to {cores} for full speed) or --cpus-per-worker"
        )
    return max(cores, asked)


def plan_workers(config: WorkerConfig, cluster: Cluster, num_chunks: int | None = None) -> WorkerPlan:
    """Decide on the number of workers and the resources of each.

    ``num_chunks`` is the number of chunks of a batch with --reproducible. The number of workers then does not change
    the bits, and the default is one worker with one CPU per chunk, if there are enough CPUs.

    Raises UsageError if the nodes cannot hold the workers, unless ``config.autoscaling`` promises more nodes: Ray does
    not report how many an autoscaler can start.
    """
    labels = dict(label.split("=", 1) for label in config.label_selector or ())
    nodes = suitable(cluster.nodes, labels)
    if num_chunks is not None:
        config = _for_chunks(config, nodes, num_chunks)
    use_gpu = _resolve_gpu(config, nodes)
    num_workers = _resolve_count(config, nodes, use_gpu)
    min_workers = _resolve_minimum(config, num_workers)
    cpus_per_worker = _fit_cpus(config, nodes, use_gpu, num_workers, min_workers)
    if cpus_per_worker is None and not config.autoscaling:
        raise UsageError(_cannot_hold(config, min_workers, nodes, use_gpu, is_local=cluster.is_local))
    return WorkerPlan(
        num_workers,
        cpus_per_worker or config.cpus_per_worker or 1,
        use_gpu,
        must_scale_up=cpus_per_worker is None,
        min_workers=config.min_workers,
        placement=config.placement_strategy,
        labels=labels,
        is_local=cluster.is_local,
    )


def _for_chunks(config: WorkerConfig, nodes: Sequence[Node], num_chunks: int) -> WorkerConfig:
    cpus = config.cpus_per_worker or 1
    num_workers = config.num_workers or max(1, min(num_chunks, sum(node.num_cpus // cpus for node in nodes)))
    return dataclasses.replace(config, num_workers=num_workers, cpus_per_worker=cpus, use_gpu="no")


def _resolve_gpu(config: WorkerConfig, nodes: Sequence[Node]) -> bool:
    """Return whether each worker gets a GPU. Raises UsageError if there is none."""
    if config.use_gpu == "yes" and not any(node.num_gpus for node in nodes) and not config.autoscaling:
        raise UsageError("--use-gpu yes, but the cluster has no GPU; use --use-gpu no")
    return config.use_gpu == "yes" or (config.use_gpu == "auto" and _room_on_gpus(config, nodes) > 0)


def _resolve_count(config: WorkerConfig, nodes: Sequence[Node], use_gpu: bool) -> int:
    """Return the number of workers: by default one per GPU, else one per node."""
    most = _room_on_gpus(config, nodes) if use_gpu else sum(node.num_cpus > 0 for node in nodes)
    return config.num_workers or max(1, most)


def _room_on_gpus(config: WorkerConfig, nodes: Sequence[Node]) -> int:
    return sum(node.room(config.cpus_per_worker or 1, use_gpu=True) for node in nodes)


def _resolve_minimum(config: WorkerConfig, num_workers: int) -> int:
    """Return the number of workers that the nodes must hold. Raises UsageError for an impossible min_workers."""
    if config.min_workers is None:
        return num_workers
    if config.placement_strategy.startswith("STRICT"):
        asked = f"placement_strategy {config.placement_strategy}"
        raise UsageError(f"{asked} needs a fixed --num-workers: Ray cannot use fewer workers")
    if config.min_workers > num_workers:
        workers = count(num_workers, "worker")
        raise UsageError(f"min_workers {config.min_workers} is more than the {workers} of this run")
    return config.min_workers


def _fit_cpus(
    config: WorkerConfig, nodes: Sequence[Node], use_gpu: bool, num_workers: int, min_workers: int
) -> int | None:
    """Return the CPUs of each worker if all workers fit, or else if the minimum fits; otherwise None."""
    for number in (num_workers, min_workers):
        if cpus := cpus_for_each(nodes, number, config.cpus_per_worker, use_gpu, config.placement_strategy):
            return cpus
    return None


def cpus_for_each(
    nodes: Sequence[Node], num_workers: int, cpus_per_worker: int | None, use_gpu: bool, placement: str = "PACK"
) -> int | None:
    """Return the CPUs of each worker: the given number, or the maximum that fits; None if the workers do not fit."""
    most = max((node.num_cpus for node in nodes), default=0)
    candidates = range(most, 0, -1) if cpus_per_worker is None else [cpus_per_worker]
    for cpus in candidates:
        rooms = [node.room(cpus, use_gpu) for node in nodes]
        if placement == "STRICT_SPREAD":
            rooms = [min(room, 1) for room in rooms]
        if (max(rooms, default=0) if placement == "STRICT_PACK" else sum(rooms)) >= num_workers:
            return cpus
    return None


def held_at_once(plan: WorkerPlan, nodes: Sequence[Node]) -> int:
    """Return how many runs with such workers the nodes hold at a time, at least one."""
    rooms = [node.room(plan.cpus_per_worker, plan.use_gpu) for node in suitable(nodes, plan.labels)]
    return max(1, sum(rooms) // plan.num_workers)


def _cannot_hold(
    config: WorkerConfig, num_workers: int, nodes: Sequence[Node], use_gpu: bool, *, is_local: bool
) -> str:
    asked, there = _workers(config, num_workers), f"{sum(node.num_cpus for node in nodes)} CPUs"
    if use_gpu:
        asked, there = f"{asked} and 1 GPU", f"{there} and {sum(node.num_gpus for node in nodes)} GPUs"
    if config.placement_strategy.startswith("STRICT"):
        asked += f", {config.placement_strategy}"
    there += f" on {count(len(nodes), 'node')}"
    advice = "lower --num-workers" + (" or --cpus-per-worker" if config.cpus_per_worker else "")
    if config.label_selector:
        there += f" with {', '.join(config.label_selector)}"
        advice += ", or leave label_selector out"
    if use_gpu:
        advice += ", or use --use-gpu no"
    if not is_local:
        advice += ", or add --autoscaling if it starts nodes on demand"
    return f"the cluster cannot hold {asked}: it has {there}; {advice}"


def _workers(config: WorkerConfig, num_workers: int) -> str:
    return f"{count(num_workers, 'worker')} of {count(config.cpus_per_worker or 1, 'CPU')}"


def threads_per_worker(assigned_cpus: float, cores: int, workers_on_node: int, local_batch_size: int) -> int:
    """Return a worker's number of threads: the CPUs that Ray gave it, but at most its share of the real cores.

    Each thread gets a minimum number of examples: with fewer, threads lose more time waiting than they save.
    """
    return max(1, min(int(assigned_cpus), cores // workers_on_node, local_batch_size // _MIN_EXAMPLES_PER_THREAD))
