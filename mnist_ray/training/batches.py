"""Loading: from slices of an epoch's order to batches of tensors on the device."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mnist_ray.config import READ_AHEAD_MIB
from mnist_ray.errors import first_line
from mnist_ray.training.sampler import Slice
from mnist_ray.workload.data import Arrays, Blocks, Split
from mnist_ray.workload.tensors import map_tensors

Collate = Callable[[list[tuple[Any, Any]]], "tuple[Any, Any] | None"]
_MOST_OF_GPU = 0.4  # of a GPU's free memory; activations and a second worker may need the rest


class Batch(NamedTuple):
    """One rank's slice of a global batch, or a piece of the slice."""

    inputs: Any  # in the form of the workload's data, (examples, ...), or as its ``collate`` returns them
    targets: Any  # likewise
    global_size: int  # number of examples in the whole batch, over all ranks
    ends_step: bool = True  # whether this is the rank's last piece of the batch
    counts: bool = True  # False: the rank has no examples, and the loss of this one counts nothing


class ArrayBatches(Dataset):
    """Arrays in memory, indexed by whole slices.

    On the CPU, the tensors are views of the given arrays. The arrays are copied once to a GPU with enough memory.
    """

    def __init__(self, arrays: Arrays, device: torch.device) -> None:
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # in PyTorch's cache
            if arrays.inputs.nbytes + arrays.targets.nbytes > _MOST_OF_GPU * free:
                device = torch.device("cpu")
        self.inputs = _tensor(arrays.inputs).to(device)
        self.targets = _tensor(arrays.targets).to(device)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, chosen: Slice) -> Batch:
        indices = torch.from_numpy(chosen.indices)
        if self.inputs.is_cuda:
            indices = indices.pin_memory().to(self.inputs.device, non_blocking=True)
        return Batch(self.inputs[indices], self.targets[indices], *chosen[1:])


class ExampleError(Exception):
    """An example cannot be read, or does not fit the others; a retry would fail too."""


class ExampleBatches(Dataset):
    """A ``Dataset`` that is read example by example, or memory-mapped arrays. Loader processes can read both.

    Before each example is read, the generators of Python, NumPy and torch are seeded. So its random numbers depend only
    on the seed and the example's index in the user's ``Dataset``, not on interruptions, splits or the number of ranks,
    tasks and loader processes.
    """

    def __init__(self, split: Split, seed: int = 0, collate: Collate | None = None) -> None:
        self.split, self.seed, self.collate = split, seed, collate

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, chosen: Slice) -> Batch:
        places = self.split.places(chosen.indices)
        if isinstance(arrays := self.split.examples, Arrays):
            return Batch(_rows(arrays.inputs, places), _rows(arrays.targets, places), *chosen[1:])
        return self._joined([self._example(place) for place in places.tolist()], places, chosen)

    def _joined(self, examples: list[tuple[Any, Any]], places: np.ndarray, chosen: Slice) -> Batch:
        """Join examples, whose indices in the user's data are ``places``, to a batch."""
        joined = None if self.collate is None else self.collate(examples)
        try:
            inputs, targets = default_collate(examples) if joined is None else joined
        except (RuntimeError, TypeError, ValueError) as error:
            if joined is not None:
                raise ExampleError("collate must return a pair (inputs, targets)") from error
            reason = _misfit(places, examples) or first_line(error)
            remedy = "make them alike in the Dataset, or join them in the workload's collate()"
            raise ExampleError(f"{self.split.origin} examples do not fit together: {reason}; {remedy}") from error
        return Batch(inputs, targets, *chosen[1:])

    def _example(self, place: int) -> tuple[Any, Any]:
        seed = (self.seed * 2_147_483_647 + place) % 2**63
        torch.default_generator.manual_seed(seed)  # 100 times as fast as torch.manual_seed, which seeds all devices
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            example: tuple[Any, Any] = self.split.examples[place]
            return example
        except (LookupError, OSError, RuntimeError, SystemExit, TypeError, ValueError) as error:
            if getattr(error, "errno", None) is not None:  # an error of the storage: a retry may succeed
                raise
            kind = "" if isinstance(error, (OSError, SystemExit)) else f"{type(error).__name__}: "
            said = f"{self.split.origin} example {place} cannot be read: {kind}{first_line(error)}"
            raise ExampleError(said) from error


def _misfit(places: np.ndarray, examples: list[tuple[Any, Any]]) -> str:
    """Name the first example whose shapes differ from those of the batch's first example."""
    shapes = [tuple(map(np.shape, example)) for example in examples]
    for place, shape in zip(places.tolist(), shapes, strict=False):
        if shape != shapes[0]:
            return f"example {place} has shapes {shape}, example {places[0]} has {shapes[0]}"
    return ""


def batches_of(
    split: Split, device: torch.device, collate: Collate | None = None, read_ahead_mib: int = READ_AHEAD_MIB
) -> ArrayBatches | ExampleBatches:
    """Return the data set from which a loader reads a split; ``collate`` is the workload's."""
    allow_read_only()
    if isinstance(split.examples, Blocks):
        from mnist_ray.training.block_batches import BlockBatches  # derives from a class of this module

        return BlockBatches(split, collate, read_ahead_mib)
    return ArrayBatches(split.arrays, device) if split.arrays is not None else ExampleBatches(split, 0, collate)


def allow_read_only(loader_process: int = 0) -> None:
    """Silence torch about read-only arrays, such as those from the object store: nothing here writes to them."""
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _rows(array: np.ndarray, places: np.ndarray) -> Tensor:
    """Copy rows into torch's memory, which always has the same alignment: the bits of a sum may depend on it."""
    rows = torch.empty((len(places), *array.shape[1:]), dtype=_tensor(array[:0]).dtype)
    np.take(array, places, axis=0, out=rows.numpy(), mode="clip")  # the default mode would copy the rows twice
    return rows


def batch_loader(
    dataset: ArrayBatches | ExampleBatches, slices: Iterable[Slice], device: torch.device, num_processes: int = 0
) -> DataLoader:
    """Return a loader that reads ``slices``. ``num_processes`` processes read a ``Dataset`` or mapped arrays ahead.

    With ``batch_size=None``, the DataLoader passes each slice to the data set as it is, so arrays are indexed once per
    batch. By default, it would read the examples one by one and stack them.
    """
    is_on_gpu = isinstance(dataset, ArrayBatches) and dataset.inputs.is_cuda
    return DataLoader(
        dataset,
        sampler=slices,
        batch_size=None,
        num_workers=num_processes if type(dataset) is ExampleBatches else 0,  # threads read blocks
        pin_memory=device.type == "cuda" and not is_on_gpu,  # elsewhere, it would only take memory of the first GPU
        worker_init_fn=allow_read_only,
    )


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches on a device. A GPU copies a batch on a stream of its own while it computes the step before."""
    if device.type == "cpu":
        yield from batches
        return
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            moved: Batch = map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)
        computing.wait_stream(copying)
        map_tensors(lambda tensor: tensor.record_stream(computing), moved)  # else its memory might be reused too early
        yield moved
