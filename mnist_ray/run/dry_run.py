"""One batch goes through a workload before it is trained."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mnist_ray.run.job import Job
from mnist_ray.workload.data import Splits
from mnist_ray.workload.source import is_shipped, picture_of, placed

if TYPE_CHECKING:
    from mnist_ray.training.batches import Batch


def dry_run(job: Job, data: Splits, batch_sizes: Sequence[int] = ()) -> Callable[[], None]:
    """Let one batch go through a job's workload; return what is left to do while Ray starts: that, and imports.

    A user's own workload is tried here and now, so that a mistake is said before anything is started. That of this
    package was tried when it was built: it need not be waited for. ``batch_sizes`` are those that a sweep tries. Raises
    UsageError.
    """

    def try_batch() -> None:
        import numpy as np  # torch too, by the two below: this is where it is first needed
        import torch

        from mnist_ray.training.batches import batches_of
        from mnist_ray.training.sampler import Slice
        from mnist_ray.workload.check import NUM_EXAMPLES, check_batch, check_smallest

        def first(number: int) -> Batch:
            with placed(job.workload, "an example"):
                return batches_of(data.train, torch.device("cpu"))[Slice(np.arange(number))]

        with placed(job.workload, "an example"):
            inputs, _ = data.train[0]
        picture_of(job.workload, inputs)
        batch = first(min(NUM_EXAMPLES, len(data.train)))
        job.workload.metadata["model_input"] = check_batch(job.workload, batch.inputs, batch.targets, job.train)
        for size in batch_sizes or [job.train.batch_size]:
            last = len(data.train) % size or size
            smallest = max(1, last // (job.train.chunks or job.workers.num_workers or 1))
            check_smallest(job.workload, first(smallest).inputs, smallest, size, job.train)

    is_tried_now = not is_shipped(type(job.workload))
    if is_tried_now:
        try_batch()

    def meanwhile() -> None:
        importlib.import_module("mnist_ray.run.fit")  # and Ray Train, of which ray.init imports nothing meanwhile
        if not is_tried_now:
            try_batch()

    return meanwhile
