"""Gives all nodes the data, by Ray's object store or by loading it on each; checks that nodes can take part."""

from __future__ import annotations

import contextlib
import socket
import uuid
from dataclasses import dataclass

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_ray.cluster.devices import UnusableGPUError, device_here
from mnist_ray.cluster.plan import WorkerPlan, node_of, suitable
from mnist_ray.data.data import Blocks, Origin, Split
from mnist_ray.data.order import AllBut
from mnist_ray.errors import JobError, TrainingStoppedError, first_line
from mnist_ray.provenance import versions
from mnist_ray.storage import STORAGE_ERRORS, RunFolder
from mnist_ray.workload.base import Workload
from ray_fork.starting import has_own_python

_TIMEOUT_S, _INSTALLING_TIMEOUT_S = 60.0, 900.0  # the latter if nodes first install packages


@dataclass(frozen=True)
class RemoteSplit:
    """A split that any process of the cluster can open."""

    workload: Workload
    origin: Origin  # the field of the workload's ``Data`` that holds its examples
    size: int
    whole_size: int  # of the field
    stored: ray.ObjectRef | None  # arrays or Blocks in Ray's object store; the processes on a node share one copy
    indices: np.ndarray | AllBut | None  # its examples in what is stored, or in the loaded data; None: all

    def __len__(self) -> int:
        return self.size

    def open(self) -> Split:
        """Return the split. If it is not stored, this process loads the workload's data itself.

        Raises TrainingStoppedError if these have another number of examples than the job's.
        """
        examples = getattr(self.workload.load_data(), self.origin) if self.stored is None else ray.get(self.stored)
        if len(examples) != self.whole_size:
            differ = f"load_data has {len(examples):,} {self.origin} examples here, {self.whole_size:,} in the job"
            raise TrainingStoppedError(f"{differ}; it must return the same in every process")
        return Split(examples, self.indices, self.origin)


def share(workload: Workload, split: Split) -> RemoteSplit:
    """Share a split: arrays in memory, and Blocks (which hold no examples), go into the object store."""
    is_stored = split.whole_arrays is not None or isinstance(split.examples, Blocks)
    stored = ray.put(split.examples) if is_stored else None
    return RemoteSplit(workload, split.origin, len(split), len(split.examples), stored, split.indices)


def check_nodes(run: RunFolder, plan: WorkerPlan, own_versions: dict[str, str] | None = None) -> list[str]:
    """Let every node for workers read a file that the driver writes next to the run; return the nodes' hosts.

    With the driver's ``own_versions``, nodes compare theirs, and try a GPU if the workers have any. Raises JobError if
    a node's versions differ, if it cannot read the file, or if PyTorch cannot use its GPU.
    """
    probe = f".probe-{uuid.uuid4().hex}"
    run.storage.write_text(probe, probe)  # the content is the name
    answers, checked = [], list[tuple[str, str]]()
    for node in ray.nodes():
        if not node["Alive"] or not suitable([node_of(node["Resources"], node["Labels"])], plan.labels):
            continue
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        num_gpus = int(own_versions is not None and plan.use_gpu and "GPU" in node["Resources"])
        task = ray.remote(num_cpus=0, num_gpus=num_gpus, scheduling_strategy=place)(check_here)
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
        if not problem and own != drivers_own:  # a local part, such as +cu128, tells only for which GPUs torch is
            problem = f"has {name} {version}, the driver has {drivers[name]}"
    try:
        device_here()
    except UnusableGPUError as error:
        problem = problem or f"has a GPU, but {error}"
    return socket.gethostname(), problem
