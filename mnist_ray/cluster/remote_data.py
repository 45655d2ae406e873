"""How a part of the data gets to the processes that need it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import ray

from mnist_ray.workload.base import Workload
from mnist_ray.workload.data import Origin, Split
from mnist_ray.workload.order import AllBut


@dataclass(frozen=True)
class RemoteSplit:
    """A part that any process of the cluster can open."""

    workload: Workload
    origin: Origin  # which of the workload's data it is made of
    size: int
    stored: ray.ObjectRef | None  # arrays in Ray's object store, of which all processes on a node see one copy
    indices: np.ndarray | AllBut | None  # where it is not stored: which examples it has; None: all

    def __len__(self) -> int:
        return self.size

    def open(self) -> Split:
        """Return the part. Where it is not stored, this process loads the workload's data for itself."""
        if self.stored is not None:
            return Split(ray.get(self.stored), None, self.origin)
        return Split(getattr(self.workload.load_data(), self.origin), self.indices, self.origin)


def share(workload: Workload, split: Split) -> RemoteSplit:
    """Share a part: arrays in memory are put into the object store."""
    stored = None if split.arrays is None else ray.put(split.arrays)
    return RemoteSplit(workload, split.origin, len(split), stored, split.indices)
