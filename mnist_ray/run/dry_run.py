"""One batch goes through a workload before it is trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mnist_ray.run.job import Job
from mnist_ray.training.batches import Batch, batches_of
from mnist_ray.training.sampler import Slice
from mnist_ray.workload.check import NUM_EXAMPLES, check_batch, check_smallest
from mnist_ray.workload.data import Split
from mnist_ray.workload.loading import picture_of, placed


def try_batch(job: Job, train: Split, batch_sizes: Sequence[int]) -> None:
    """Let one batch go through a job's workload, whose metadata say from then on what its model takes.

    So do the smallest that a worker gets of ``batch_sizes``, those that a sweep tries. Raises UsageError.
    """
    workload = job.workload

    def first(number: int) -> Batch:
        with placed(workload, "an example"):
            return batches_of(train, torch.device("cpu"))[Slice(np.arange(number))]

    with placed(workload, "an example"):
        inputs, _ = train[0]
    picture_of(workload, inputs)
    batch = first(min(NUM_EXAMPLES, len(train)))
    workload.metadata["model_input"] = check_batch(workload, batch.inputs, batch.targets, job.train)
    for size in batch_sizes or [job.train.batch_size]:
        last = len(train) % size or size
        smallest = max(1, last // (job.train.chunks or job.workers.num_workers or 1))
        check_smallest(workload, first(smallest).inputs, smallest, size, job.train)
