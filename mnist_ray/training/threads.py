"""Chooses one thread if steps are small: several threads would wait for each other longer than they compute."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
import torch.distributed as dist

from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import batches_of
from mnist_ray.data.data import Split
from mnist_ray.data.sampler import Request
from mnist_ray.parallel import sharding
from mnist_ray.parallel.group import Group
from mnist_ray.training.gradients import backward
from mnist_ray.training.state import TrainingState
from mnist_ray.workload.base import Workload

_MAX_PASS_S = 1e-3  # a longer forward and backward pass gains from more threads
_MAX_MODEL_BYTES = 2**24  # a larger model takes longer
_NUM_PASSES = 10  # of which the fastest counts: other programs slow some


def is_one_faster(workload: Workload, state: TrainingState, split: Split, config: TrainConfig, group: Group) -> bool:
    """Return whether one thread is as fast as this process's threads at a forward and backward pass of a slice.

    Measured on another model. All ranks must call this; all return the same. Only for arrays in memory, because
    reading a ``Dataset`` takes longer than such a pass.
    """
    num_bytes = sum(parameter.nbytes for parameter in state.model.parameters())
    if group.device.type != "cpu" or config.compile or num_bytes > _MAX_MODEL_BYTES or split.whole_arrays is None:
        return False
    is_faster = torch.get_num_threads() > 1 and _is_one_faster_here(workload, split, config, group)
    of_all = torch.tensor(int(is_faster))
    if group.world_size > 1:
        dist.all_reduce(of_all, dist.ReduceOp.MIN)
    return bool(of_all)


def _is_one_faster_here(workload: Workload, split: Split, config: TrainConfig, group: Group) -> bool:
    planned, model = torch.get_num_threads(), sharding.create_model(workload, config).train()
    batches, size = batches_of(split, group.device), min(len(split), math.ceil(config.batch_size / group.world_size))
    slice_ = batches[Request(np.arange(min(size, config.micro_batch_size or size)), size)]

    def seconds(num_threads: int) -> float:
        torch.set_num_threads(num_threads)
        start = time.perf_counter()
        backward(workload, model, slice_, config, 1 / size, torch.default_generator)
        return time.perf_counter() - start

    is_slow = seconds(1) > 100 * _MAX_PASS_S or seconds(1) > 10 * _MAX_PASS_S  # the first pass also warms up
    pairs = [(seconds(1), seconds(planned)) for _ in range(0 if is_slow else _NUM_PASSES)]
    torch.set_num_threads(planned)
    return not is_slow and min(alone for alone, _ in pairs) <= min(_MAX_PASS_S, *(together for _, together in pairs))
