"""Choices that depend on how fast a processor computes the model: one thread, and fp32 in place of bf16.

All ranks must call the functions, and all return the same. They time gradients of a slice of another model.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import Batches, batch_loader
from mnist_ray.data.data import Split
from mnist_ray.data.sampler import Request
from mnist_ray.data.tensors import with_fast_layout
from mnist_ray.parallel.group import Group
from mnist_ray.training.state import TrainingState
from mnist_ray.training.step import Step
from mnist_ray.workload.base import Workload
from mnist_ray.workload.calls import seeded_model

_MAX_PASS_S = 1e-3  # a longer forward and backward pass gains from more threads
_MAX_SMALL_BYTES = 2**24  # a larger model takes longer
_NUM_PASSES = 10  # of which the fastest counts: other programs slow some

# A pass in bf16 must take longer than one in fp32 by this factor and by these seconds: less is noise, or is cheap.
_MIN_RATIO, _MIN_LOSS_S = 1.5, 5e-3
_NUM_PRECISION_PASSES = 3  # in each precision, after one to warm up
_MAX_MODEL_BYTES = 2**28  # a second model of this size fits beside the first


def is_one_thread_faster(
    workload: Workload, state: TrainingState, split: Split, config: TrainConfig, group: Group
) -> bool:
    """Return whether one thread is as fast as this process's threads at a forward and backward pass of a slice.

    Several threads wait for each other longer than they compute if steps are small. Only for arrays in memory, because
    reading a ``Dataset`` takes longer than such a pass.
    """
    is_small = _num_bytes(state) <= _MAX_SMALL_BYTES and split.whole_arrays is not None and not split.transforms
    if group.device.type != "cpu" or config.compile or not is_small:
        return False
    return all(group.gathered(_is_one_faster_here(workload, split, config, group)))


def _is_one_faster_here(workload: Workload, split: Split, config: TrainConfig, group: Group) -> bool:
    planned = torch.get_num_threads()
    if planned == 1:
        return False
    seconds = functools.partial(_seconds, _pass(workload, split, config, group), time.perf_counter)
    seconds(1)  # warms up
    if seconds(1) > 10 * _MAX_PASS_S:
        return False
    pairs = [(seconds(1), seconds(planned)) for _ in range(_NUM_PASSES)]
    return min(alone for alone, _ in pairs) <= min(_MAX_PASS_S, *(together for _, together in pairs))


def is_bf16_slow(workload: Workload, state: TrainingState, split: Split, config: TrainConfig, group: Group) -> bool:
    """Return whether a pass takes much longer in bf16 than in fp32: CPUs have no fast bf16 kernels for some layers.

    Rank 0 measures the CPU time of one thread, which other programs hardly change. Not measured on a GPU, whose bf16 is
    fast; for ``--reproducible``, which must not depend on a clock; for a stream, which would be read from its start;
    and for sharded models.
    """
    is_measured = _num_bytes(state) <= _MAX_MODEL_BYTES and not split.is_stream
    if config.reproducible or group.device.type != "cpu" or state.is_sharded or not is_measured:
        return False
    return group.gathered(group.rank == 0 and _is_bf16_slow_here(workload, split, config, group))[0]


def _is_bf16_slow_here(workload: Workload, split: Split, config: TrainConfig, group: Group) -> bool:
    bf16, fp32 = (
        functools.partial(_seconds, _pass(workload, split, replace(config, precision=precision), group))
        for precision in ("bf16", "fp32")
    )
    pairs = [(bf16(time.thread_time, 1), fp32(time.thread_time, 1)) for _ in range(1 + _NUM_PRECISION_PASSES)]
    in_bf16 = min(slow for slow, _ in pairs[1:])  # the first passes warm up
    in_fp32 = min(fast for _, fast in pairs[1:])
    return in_bf16 > max(_MIN_RATIO * in_fp32, in_fp32 + _MIN_LOSS_S)


def _num_bytes(state: TrainingState) -> int:
    return sum(parameter.nbytes for parameter in state.model.parameters())


def _pass(workload: Workload, split: Split, config: TrainConfig, group: Group) -> Callable[[], None]:
    """Return a function that computes a gradient of another model, from the slice of a rank of ``group``."""
    model = with_fast_layout(seeded_model(workload, config.seed)).train()
    size = min(len(split), math.ceil(config.batch_size / group.world_size))
    request = Request(np.arange(min(size, config.micro_batch_size or size)), size)
    (batch,) = batch_loader(Batches(split, group.device, workload.collate), [request], group.device)
    step = Step(workload, TrainingState(model, {}, {}), replace(config, reproducible=False), Group())

    def compute() -> None:
        step.begin([batch])
        step.backward(workload.batch_loss)

    return compute


def _seconds(compute: Callable[[], None], clock: Callable[[], float], num_threads: int) -> float:
    """Return the seconds that a pass takes with a number of threads."""
    planned = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        start = clock()
        compute()
        return clock() - start
    finally:
        torch.set_num_threads(planned)
