"""Sharded loading: each rank's slices of global batches that do not depend on the number of ranks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mnist_ray.workload.mnist.idx import Split


class Batch(NamedTuple):
    """One rank's slice of a global batch."""

    images: Tensor
    """(local batch size, 28, 28) uint8; the slice may be empty."""
    labels: Tensor
    """(local batch size,) uint8."""
    global_size: int
    """Images of the whole batch over all ranks."""


def num_steps(num_images: int, batch_size: int) -> int:
    """Return the optimizer steps of an epoch; the last batch may be smaller."""
    return math.ceil(num_images / batch_size)


class ShardedBatchSampler(Sampler[tuple[np.ndarray, int]]):
    """One rank's slices of an epoch's global batches: (indices of the slice, size of the global batch).

    The global batches depend on (seed, epoch) only, never on the number of ranks: the epoch's permutation is cut
    into batches, and rank r of w takes the r-th of w slices of each. So a run may go on with other workers, at any
    ``first_step``, and see the batches it would have seen. All ranks get the same number of slices.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        rank: int = 0,
        world_size: int = 1,
        first_step: int = 0,
    ) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.rank = rank
        self.world_size = world_size
        self.first_step = first_step

    def __len__(self) -> int:
        return num_steps(self.num_images, self.batch_size) - self.first_step

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_images)
        for start in range(self.first_step * self.batch_size, self.num_images, self.batch_size):
            batch = order[start : start + self.batch_size]
            first = len(batch) * self.rank // self.world_size
            last = len(batch) * (self.rank + 1) // self.world_size
            yield batch[first:last], len(batch)


class BatchDataset(Dataset):
    """A split that is indexed by whole batches, on the device where it is trained on.

    On the CPU the tensors are views of the given arrays; on a GPU the whole set is copied there once.
    """

    def __init__(self, split: Split, device: torch.device) -> None:
        with warnings.catch_warnings():  # read-only arrays from the object store; nothing here writes to them
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self.images = torch.from_numpy(split.images).to(device)
            self.labels = torch.from_numpy(split.labels).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, batch: tuple[np.ndarray, int]) -> Batch:
        indices, global_size = batch
        on_device = torch.from_numpy(indices).to(self.images.device)
        return Batch(self.images[on_device], self.labels[on_device], global_size)


def epoch_loader(dataset: BatchDataset, sampler: ShardedBatchSampler) -> DataLoader:
    """Return a loader of one rank's batches of an epoch.

    ``batch_size=None`` makes the DataLoader hand each of the sampler's items to the data set as it is: one indexing
    operation a batch, where the usual loader makes one a sample and then stacks them.
    """
    return DataLoader(dataset, sampler=sampler, batch_size=None)
