"""Gives all nodes the data, through Ray's object store or by loading it on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray

from mnist_ray.data.data import Origin, Split, Transform, as_streamed
from mnist_ray.data.order import AllBut
from mnist_ray.errors import TrainingStoppedError
from mnist_ray.workload.base import Workload


@dataclass(frozen=True)
class RemoteSplit:
    """A split that any process of the cluster can open."""

    workload: Workload
    origin: Origin  # the field of the workload's ``Data`` with its examples
    size: int
    whole_size: int  # of the field
    stored: ray.ObjectRef | None  # arrays or Blocks in Ray's object store; the processes on a node share one copy
    indices: np.ndarray | AllBut | None  # its examples in the stored or loaded data; None: all
    draws: np.ndarray | None = None  # like those of a Split
    places: np.ndarray | AllBut | None = None
    transforms: Sequence[Transform] = ()  # may be functions of the workload's file, so they are unpickled after it

    def __len__(self) -> int:
        return self.size

    def open(self) -> Split:
        """Return the split. If it is not stored, this process loads the workload's data itself.

        Raises TrainingStoppedError if the number of loaded examples differs from the job's.
        """
        is_stored = self.stored is not None
        examples = ray.get(self.stored) if is_stored else as_streamed(getattr(self.workload.load_data(), self.origin))
        if len(examples) != self.whole_size:
            differ = f"load_data has {len(examples):,} {self.origin} examples here, {self.whole_size:,} in the job"
            raise TrainingStoppedError(f"{differ}; it must return the same in every process")
        return Split(examples, self.indices, self.origin, self.draws, self.places, self.transforms)


def may_be_stored(split: Split) -> bool:
    """Return whether the object store can hold a split: all of some arrays in memory, or Blocks without examples."""
    return split.whole_arrays is not None or split.is_in_blocks


def share(workload: Workload, split: Split) -> RemoteSplit:
    """Share a split: put arrays in memory, and Blocks (without their examples), into the object store."""
    stored = ray.put(split.examples) if may_be_stored(split) else None
    places = None if split.draws is None else split.places
    of_field = workload, split.origin, len(split), len(split.examples)
    return RemoteSplit(*of_field, stored, split.indices, split.draws, places, split.transforms)
