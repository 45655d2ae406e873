"""Whether a processor computes the model more slowly in bf16 than in fp32."""

from __future__ import annotations

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

# A pass in bf16 must take longer than one in fp32 by this factor and by these seconds: less is noise, or is cheap.
_MIN_RATIO, _MIN_LOSS_S = 1.5, 5e-3
_NUM_PASSES = 3  # in each precision, after one to warm up
_MAX_MODEL_BYTES = 2**28  # a second model of this size fits beside the first


def is_bf16_slow(workload: Workload, state: TrainingState, split: Split, config: TrainConfig, group: Group) -> bool:
    """Return whether a pass takes much longer in bf16 than in fp32: CPUs have no fast bf16 kernels for some layers.

    Rank 0 measures the CPU time of one thread, which other programs hardly change. Not measured on a GPU, whose bf16 is
    fast; for ``--reproducible``, which must not depend on a clock; for a stream, which would be read from its start;
    and for sharded models. All ranks must call this, and all return the same.
    """
    num_bytes = sum(parameter.nbytes for parameter in state.model.parameters())
    is_measured = num_bytes <= _MAX_MODEL_BYTES and not split.is_stream
    if config.reproducible or group.device.type != "cpu" or state.is_sharded or not is_measured:
        return False
    return group.gathered(group.rank == 0 and _is_bf16_slow_here(workload, split, config, group))[0]


def _is_bf16_slow_here(workload: Workload, split: Split, config: TrainConfig, group: Group) -> bool:
    bf16, fp32 = (_pass(workload, split, replace(config, precision=each), group) for each in ("bf16", "fp32"))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pairs = [(_seconds(bf16), _seconds(fp32)) for _ in range(1 + _NUM_PASSES)]
    finally:
        torch.set_num_threads(num_threads)
    in_bf16 = min(slow for slow, _ in pairs[1:])  # the first passes warm up
    in_fp32 = min(fast for _, fast in pairs[1:])
    return in_bf16 > max(_MIN_RATIO * in_fp32, in_fp32 + _MIN_LOSS_S)


def _pass(workload: Workload, split: Split, config: TrainConfig, group: Group) -> Callable[[], None]:
    """Return a function that computes a gradient of another model, from the slice of a rank of ``group``."""
    model = with_fast_layout(seeded_model(workload, config.seed)).train()
    size = min(len(split), math.ceil(config.batch_size / group.world_size))
    request = Request(np.arange(min(size, config.micro_batch_size or size)), size)
    (batch,) = batch_loader(Batches(split, group.device, workload.collate), [request], group.device)
    step = Step(workload, TrainingState(model, {}, {}), replace(config, reproducible=False), Group())

    def compute() -> None:
        with step.on([batch]):
            step.backward(workload.batch_loss)

    return compute


def _seconds(compute: Callable[[], None]) -> float:
    start = time.thread_time()
    compute()
    return time.thread_time() - start
