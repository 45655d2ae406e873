"""Loading: from the sampler's requests to batches of tensors on the device."""

from __future__ import annotations

import bdb
import ctypes
import functools
import math
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, default_collate

from mnist_ray.config import READ_AHEAD_MIB, TrainConfig
from mnist_ray.data.block_reader import BlockReader, OnDemand, ReadAhead
from mnist_ray.data.data import Arrays, Blocks, Split, map_arrays
from mnist_ray.data.order import Drawn, StreamOrder, part_of
from mnist_ray.data.sampler import Request
from mnist_ray.data.splits import sizes_in
from mnist_ray.data.streamed import Streamed
from mnist_ray.data.tensors import map_tensors
from mnist_ray.errors import ExampleError, UsageError, first_line

FindFault = Callable[[Any], str]
Collate = Callable[[list[tuple[Any, Any]]], "tuple[Any, Any] | None"]
_PASSING = (MemoryError, ConnectionError, TimeoutError, bdb.BdbQuit)  # the last one ends a debugger
_PR_SET_PDEATHSIG = 1  # of prctl.h: the signal for a process whose parent has exited
_MAX_PART_OF_GPU = 0.4  # of a GPU's free memory; activations and a second worker may need the rest


class MicroBatch(NamedTuple):
    """A micro-batch as tensors, or a batch of an evaluation."""

    inputs: Any  # in the form of the workload's data, (examples, ...), or as its ``collate`` returns them
    targets: Any  # likewise
    num_examples: int  # in this micro-batch; a filler has one
    global_size: int  # number of examples in the whole batch, over all ranks
    ends_step: bool = True  # whether this is the rank's last micro-batch of the step
    is_filler: bool = False  # the rank has no examples of this batch; this one's loss does not count
    read_to: Any = None  # of a stream: where a run that resumes after this step may go on reading


def _loaded(request: Request, inputs: Any, targets: Any) -> MicroBatch:
    number = len(request.indices)
    return MicroBatch(inputs, targets, number, request.global_size, request.ends_step, request.is_filler)


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch (that of the CPU), NumPy and Python."""
    torch.default_generator.manual_seed(seed)  # 100 times as fast as torch.manual_seed, which seeds all devices
    np.random.seed(seed % 2**32)
    random.seed(seed)


class ArrayBatches(Dataset):
    """Arrays in memory, indexed once per request.

    On the CPU, the tensors are views of the given arrays. The arrays are copied once to a GPU with enough memory.
    """

    def __init__(self, arrays: Arrays, device: torch.device, weights: np.ndarray | None = None) -> None:
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # in PyTorch's cache
            if arrays.nbytes > _MAX_PART_OF_GPU * free:
                device = torch.device("cpu")
        self.device, self._size, self._weights = device, len(arrays), weights
        self._whole = tuple(map_arrays(self._tensor, values) for values in (arrays.inputs, arrays.targets))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, request: Request) -> MicroBatch:
        indices = torch.from_numpy(request.indices)
        if self.device.type == "cuda":
            indices = indices.pin_memory().to(self.device, non_blocking=True)
        inputs, targets = (map_tensors(lambda tensor: tensor[indices], part) for part in self._whole)
        return _loaded(request, inputs, targets)

    def order(self, config: TrainConfig, pass_number: int, *position: int) -> Drawn | None:
        """Return the order of a pass over the data; None: a permutation."""
        return None if self._weights is None else Drawn(self._weights, (config.seed, pass_number))


class ExampleBatches(Dataset):
    """A ``Dataset`` that is read example by example, or memory-mapped arrays. Loader processes can read both.

    Before each example is read, the generators of Python, NumPy and torch are seeded. So an example's random numbers
    depend only on the seed and its index in the user's ``Dataset``, not on interruptions, splits, or the number of
    ranks, tasks and loader processes. Of examples that are drawn by weight, the number of the draw counts instead of
    the index: one that is drawn again gets other random numbers.
    """

    max_processes: int | None = None  # that may read ahead; None: as many as there are

    def __init__(self, split: Split, seed: int = 0, collate: Collate | None = None) -> None:
        self.split, self.seed, self.collate = split, seed, collate

    def __len__(self) -> int:
        return len(self.split)

    def order(
        self, config: TrainConfig, pass_number: int, first_step: int, rank: int, world_size: int
    ) -> StreamOrder | Drawn | None:
        """Return the order of a pass over the data; None: a permutation.

        ``first_step``: this process's first step, counted over all epochs.
        """
        weights = self.split.weights
        return None if weights is None else Drawn(weights, (config.seed, pass_number))

    def __getitem__(self, request: Request) -> MicroBatch:
        indices = self.split.indices_of(request.indices)
        if isinstance(arrays := self.split.examples, Arrays):
            take = functools.partial(_rows, indices=indices)
            return _loaded(request, map_arrays(take, arrays.inputs), map_arrays(take, arrays.targets))
        numbers = indices if request.first_draw is None else request.first_draw + np.arange(len(indices))
        examples = [self._example(*each) for each in zip(indices.tolist(), numbers.tolist(), strict=True)]
        return self._joined(examples, indices, request)

    def _joined(self, examples: list[tuple[Any, Any]], indices: np.ndarray, request: Request) -> MicroBatch:
        """Join examples into a batch; ``indices`` are theirs in the user's data."""
        try:
            joined = None if self.collate is None else self.collate(examples)
        except StopIteration as error:  # like _example
            raise ExampleError("collate has raised StopIteration") from error
        try:
            inputs, targets = default_collate(examples) if joined is None else joined
        except (RuntimeError, TypeError, ValueError) as error:
            if joined is not None:
                raise ExampleError("collate must return a pair (inputs, targets)") from error
            reason = _misfit(indices, examples) or first_line(error)
            remedy = "make them alike in the Dataset, or join them in the workload's collate()"
            raise ExampleError(f"{self.split.origin} examples do not fit together: {reason}; {remedy}") from error
        return _loaded(request, inputs, targets)

    def _read(self, index: int) -> Any:
        return self.split.examples[index]

    def loaded_by(self, create_loader: Callable[[Dataset], Iterable[MicroBatch]]) -> Iterable[MicroBatch]:
        """Return the loader from which to read an epoch: a new one, or an earlier one that goes on."""
        return create_loader(self)

    def _example(self, index: int, number: int) -> tuple[Any, Any]:
        self._seed(number)
        return self._checked(index)

    def _seed(self, number: int) -> None:
        seed_generators((self.seed * 2_147_483_647 + number) % 2**63)

    def _checked(self, index: int) -> Any:
        try:
            return self._read(index)
        except (Exception, SystemExit) as error:  # even StopIteration: a DataLoader would take it for the data's end
            if isinstance(error, _PASSING) or getattr(error, "errno", None) is not None:  # a retry may succeed
                raise
            kind = "" if isinstance(error, (OSError, SystemExit)) else f"{type(error).__name__}: "
            said = f"{self.split.origin} example {index} cannot be read: {kind}{first_line(error)}"
            raise ExampleError(said) from error


def _misfit(indices: np.ndarray, examples: list[tuple[Any, Any]]) -> str:
    """Name the first example whose shapes differ from those of the batch's first example."""
    shapes = [tuple(map(np.shape, pytree.tree_leaves(example))) for example in examples]
    for index, shape in zip(indices.tolist(), shapes, strict=False):
        if shape != shapes[0]:
            return f"example {index} has shapes {shape}, example {indices[0]} has {shapes[0]}"
    return ""


class BlockBatches(ExampleBatches):
    """A split of ``Blocks``. Blocks are read when they are needed or, once an order is announced, ahead of time."""

    max_processes = 0  # threads read blocks

    def __init__(self, split: Split, collate: Collate | None, read_ahead_mib: int) -> None:
        super().__init__(split, 0, collate)
        self._edges = np.append(0, np.cumsum(split.examples.sizes))
        self._sizes = sizes_in(split)  # None if the indices are not sorted, with --overfit-batches
        self._read_ahead_mib = read_ahead_mib
        self._reader: BlockReader = OnDemand(split, read_ahead_mib, self._sizes)

    def order(
        self, config: TrainConfig, pass_number: int, first_step: int, rank: int, world_size: int
    ) -> StreamOrder | None:
        """Return the order of a pass over the data, and read ahead from now on; None if there is no such order.

        Raises ExampleError if there are fewer streams than workers.
        """
        if (sizes := self._sizes) is None:
            return None
        if world_size > config.num_streams:
            streams = f"the {config.num_streams} streams of blocks; start a run with more num_streams, or fewer workers"
            raise ExampleError(f"{world_size} workers are more than {streams}")
        order = functools.partial(StreamOrder, sizes, config.batch_size, config.num_streams, config.seed)
        if not isinstance(self._reader, ReadAhead):  # the first pass; the others follow without a wait
            own = part_of(config.num_streams, rank, world_size)
            passes = range(pass_number, math.ceil(config.total_steps(len(self)) / config.steps_per_pass(len(self))))
            reads = (read for later in passes for read in order(later).reads(own, first_step))
            self._reader = ReadAhead(self.split, self._read_ahead_mib, reads, first_step)
        return order(pass_number)

    def __getitem__(self, request: Request) -> MicroBatch:
        indices = self.split.indices_of(request.indices)
        blocks = np.searchsorted(self._edges, indices, side="right") - 1
        rows = indices - self._edges[blocks]
        examples_of = self._reader.examples_of(np.unique(blocks).tolist(), ends_step=request.ends_step)
        if all(isinstance(examples, Arrays) for examples in examples_of.values()):
            return _loaded(request, *_rows_of_blocks(examples_of, blocks, rows))
        examples = [examples_of[block][row] for block, row in zip(blocks.tolist(), rows.tolist(), strict=True)]
        return self._joined(examples, indices, request)


def _rows_of_blocks(arrays_of: dict[int, Arrays], blocks: np.ndarray, rows: np.ndarray) -> tuple[Any, Any]:
    """Return the inputs and targets of the examples at some rows of ``blocks``; ``arrays_of`` is sorted by block."""
    by_block = [arrays[rows[blocks == block]] for block, arrays in arrays_of.items()]
    back = torch.from_numpy(np.argsort(np.argsort(blocks, kind="stable")))  # from the blocks' order
    return pytree.tree_map(lambda *arrays: torch.from_numpy(np.concatenate(arrays))[back], *by_block)


class _Checked(Blocks):
    """Blocks that are checked as they are read: arrays must be like those of the first block, and fit the workload."""

    def __init__(self, blocks: Blocks, find_fault: FindFault) -> None:
        self._blocks, self._find_fault, self.sizes = blocks, find_fault, blocks.sizes
        self._shapes = dict[str, tuple[str, Any]]()  # of the first block that any thread has read, with its name

    def read(self, block: int) -> Any:
        examples, names = self._blocks.read(block), self._blocks.block_names
        name, fault = names[block] if names else f"block {block}", self._find_fault(examples)
        if isinstance(examples, Arrays):
            shapes = {part: array.shape[1:] for part, array in examples.named.items()}
            first, others = self._shapes.setdefault("first", (name, shapes))
            fault = f"has shapes {shapes}, but {first} has {others}" if shapes != others else fault
        if fault:
            remedy = "fix the code that reads it, or write it again and start another run"
            raise UsageError(f"{name} {fault}; {remedy}")
        return examples


def checked(split: Split, find_fault: FindFault) -> Split:
    """Return a split whose blocks, if it has any, are checked as they are read. ``find_fault`` is the workload's."""
    blocks = split.examples
    if not isinstance(blocks, Blocks):
        return split
    return Split(_Checked(blocks, find_fault), split.indices, split.origin)


def batches_of(
    split: Split, device: torch.device, collate: Collate | None = None, read_ahead_mib: int = READ_AHEAD_MIB
) -> ArrayBatches | ExampleBatches:
    """Return the data set from which a loader reads a split; ``collate`` is the workload's."""
    allow_read_only()
    if isinstance(split.examples, Blocks):
        return BlockBatches(split, collate, read_ahead_mib)
    if isinstance(split.examples, Streamed):
        from mnist_ray.data.stream_batches import StreamBatches

        return StreamBatches(split, collate)
    arrays = split.whole_arrays
    return ExampleBatches(split, 0, collate) if arrays is None else ArrayBatches(arrays, device, split.weights)


def allow_read_only() -> None:
    """Silence torch about read-only arrays, such as those from the object store: nothing here writes to them."""
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def _begin_process(number: int) -> None:
    """Set up a loader process. A signal to all of the job's processes must not kill it: the job saves a checkpoint."""
    allow_read_only()
    os.setsid()
    if sys.platform == "linux":  # a job that is killed cannot stop this process
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _rows(array: np.ndarray, indices: np.ndarray) -> Tensor:
    """Copy rows into torch's memory, which always has the same alignment: the bits of a sum may depend on it.

    ``np.take`` would first copy an array whose rows overlap, or are not contiguous in memory.
    """
    try:
        whole = torch.from_numpy(array)
    except ValueError:  # torch does not support negative strides
        return torch.from_numpy(array[indices]).clone()
    return whole[..., None].index_select(0, torch.from_numpy(indices))[..., 0]  # else no unsigned numbers of one axis


def batch_loader(
    dataset: ArrayBatches | ExampleBatches, requests: Iterable[Request], device: torch.device, num_processes: int = 0
) -> Iterable[MicroBatch]:
    """Return a loader that reads ``requests``. ``num_processes`` processes read a ``Dataset`` or mapped arrays ahead.

    Arrays on the device need no DataLoader. With ``batch_size=None``, it passes each request to the data set unchanged;
    by default, it would read the examples one by one and stack them.
    """
    if isinstance(dataset, ArrayBatches) and dataset.device.type == device.type:
        return map(dataset.__getitem__, requests)
    most = 0 if isinstance(dataset, ArrayBatches) else dataset.max_processes
    create_loader = functools.partial(
        DataLoader,
        sampler=requests,
        batch_size=None,
        num_workers=num_processes if most is None else min(num_processes, most),
        pin_memory=device.type == "cuda",  # otherwise, it would only take up memory of the first GPU
        worker_init_fn=_begin_process,
    )
    return create_loader(dataset) if isinstance(dataset, ArrayBatches) else dataset.loaded_by(create_loader)


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Return a batch on a device. A GPU copies pinned memory while this process continues."""
    if device.type == "cpu":
        return batch
    moved: MicroBatch = map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)
    return moved
