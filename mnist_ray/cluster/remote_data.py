"""Gives all nodes the data, through Ray's object store or by loading it on each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import ray

from mnist_ray.data.data import Split, as_streamed, set_name
from mnist_ray.errors import TrainingStoppedError
from mnist_ray.workload.base import Workload


@dataclass(frozen=True)
class RemoteSplit:
    """A split that any process of the cluster can open."""

    workload: Workload
    split: Split  # without its examples; it comes after the workload, of whose file transforms may be functions
    size: int
    whole_size: int  # of the field of the workload's ``Data`` with its examples
    stored: ray.ObjectRef | None  # arrays or Blocks in Ray's object store; the processes on a node share one copy

    def __len__(self) -> int:
        return self.size

    def open(self) -> Split:
        """Return the split. If it is not stored, this process loads the workload's data itself.

        Raises TrainingStoppedError if the number of loaded examples differs from the job's.
        """
        is_stored, origin = self.stored is not None, self.split.origin
        part = set_name(origin, self.split.name)
        examples = ray.get(self.stored) if is_stored else as_streamed(self.workload.load_data().parts[part])
        if len(examples) != self.whole_size:
            differ = f"load_data has {len(examples):,} {origin} examples here, {self.whole_size:,} in the job"
            raise TrainingStoppedError(f"{differ}; it must return the same in every process")
        return replace(self.split, examples=examples)


def may_be_stored(split: Split) -> bool:
    """Return whether the object store can hold a split: all of some arrays in memory, or Blocks without examples."""
    return split.whole_arrays is not None or split.is_in_blocks


def share(workload: Workload, split: Split) -> RemoteSplit:
    """Share a split: put arrays in memory, and Blocks (without their examples), into the object store."""
    stored = ray.put(split.examples) if may_be_stored(split) else None
    return RemoteSplit(workload, replace(split, examples=None), len(split), len(split.examples), stored)
