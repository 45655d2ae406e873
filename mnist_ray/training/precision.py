"""Chooses fp32 for ``--precision auto`` if a CPU computes the model much more slowly in bf16.

CPUs with bf16 in hardware have no fast bf16 kernels for some layers, such as many transposed convolutions.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from mnist_ray.config import Precision, TrainConfig
from mnist_ray.data.batches import batch_loader, batches_of
from mnist_ray.data.data import Split
from mnist_ray.data.sampler import Request
from mnist_ray.data.streamed import Streamed
from mnist_ray.data.tensors import with_fast_layout
from mnist_ray.parallel import sharding
from mnist_ray.parallel.group import Group
from mnist_ray.training.state import TrainingState
from mnist_ray.training.step import forward
from mnist_ray.workload.base import Workload

# A pass in bf16 must take longer than one in fp32 by this factor and by these seconds: less is noise, or is cheap.
_MIN_RATIO, _MIN_LOSS_S = 1.5, 5e-3
_NUM_PASSES = 3  # in each precision, after one to warm up; the fastest counts. All ranks make the same number
_MAX_MODEL_BYTES = 2**28  # a second model of this size fits beside the first


def is_bf16_slow(workload: Workload, state: TrainingState, split: Split, config: TrainConfig, group: Group) -> bool:
    """Return whether passes through another model, on a slice of a batch, take much longer in bf16 than in fp32.

    All ranks must call this; all return what rank 0 has measured: CPU time of one thread, which other programs hardly
    change. Not measured on a GPU, whose bf16 is fast; for ``--reproducible``, which must not depend on a clock; for a
    stream, which would be read from its start; and for sharded models.
    """
    num_bytes = sum(parameter.nbytes for parameter in state.model.parameters())
    is_unmeasured = state.is_sharded or num_bytes > _MAX_MODEL_BYTES or isinstance(split.examples, Streamed)
    if config.reproducible or group.device.type != "cpu" or is_unmeasured:
        return False
    model = with_fast_layout(sharding.create_model(workload, config)).train()
    size = min(len(split), math.ceil(config.batch_size / group.world_size))
    request = Request(np.arange(min(size, config.micro_batch_size or size)), size)
    (slice_,) = batch_loader(batches_of(split, group.device, workload.collate), [request], group.device)

    def seconds(precision: Precision) -> float:
        start = time.thread_time()
        outputs, _ = forward(workload, model, slice_, precision, torch.default_generator)
        leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if leaves:
            torch.stack([leaf.float().sum() for leaf in leaves]).sum().backward()  # type: ignore[no-untyped-call]
        return time.thread_time() - start

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pairs = [(seconds("bf16"), seconds("fp32")) for _ in range(1 + _NUM_PASSES)][1:]
    finally:
        torch.set_num_threads(num_threads)
    bf16, fp32 = (min(times) for times in zip(*pairs, strict=True))
    is_slow = torch.tensor(int(bf16 > max(_MIN_RATIO * fp32, fp32 + _MIN_LOSS_S)))
    if group.world_size > 1:
        dist.broadcast(is_slow, 0)
    return bool(is_slow)
