"""Batches: from the sampler's requests to tensors on the device."""

from __future__ import annotations

import copy
import ctypes
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, default_collate

from mnist_ray.config import READ_AHEAD_MIB, TrainConfig
from mnist_ray.data.data import Arrays, Split
from mnist_ray.data.order import Drawn, InOrder, Order, Shuffled, StreamOrder, part_of
from mnist_ray.data.readers import (
    ArrayReader,
    BlockReader,
    FindFault,
    ItemReader,
    Pair,
    Reader,
    StreamReader,
    naming,
    seed_example,
)
from mnist_ray.data.sampler import Request
from mnist_ray.data.tensors import map_tensors
from mnist_ray.errors import ExampleError, first_line

Collate = Callable[[list[Pair]], "Pair | None"]
_PR_SET_PDEATHSIG = 1  # of prctl.h: the signal for a process whose parent has exited


class MicroBatch(NamedTuple):
    """A micro-batch as tensors, or a batch of an evaluation."""

    inputs: Any  # in the form of the workload's data, (examples, ...), or as its ``collate`` returns them
    targets: Any  # likewise
    num_examples: int  # in this micro-batch; a filler has one
    global_size: int  # number of examples in the whole batch, over all ranks
    ends_step: bool = True  # whether this is the rank's last micro-batch of the step
    is_filler: bool = False  # the rank has no examples of this batch; this one's loss does not count
    read_to: Any = None  # of a stream: where a run that resumes after this step may go on reading


def order_of(split: Split, config: TrainConfig, pass_number: int) -> Order:
    """Return the order of a pass: examples are permuted, drawn by weight, or taken from streams of blocks.

    A stream's order is its own.
    """
    if split.is_stream:
        return InOrder()
    if (sizes := split.block_sizes) is not None:
        return StreamOrder(sizes, config.batch_size, config.num_streams, config.seed, pass_number)
    if (weights := split.weights) is not None:
        return Drawn(weights, (config.seed, pass_number))
    return Shuffled(len(split), (config.seed, pass_number))


class Batches(Dataset):
    """The batches of a split, by request. Loader processes can have copies of it.

    ``collate`` and ``find_fault`` are the workload's; ``seed`` decides the random numbers that examples draw.
    """

    def __init__(
        self,
        split: Split,
        device: torch.device,
        collate: Collate | None = None,
        find_fault: FindFault = lambda examples: "",
        read_ahead_mib: int = READ_AHEAD_MIB,
    ) -> None:
        allow_read_only()
        self.split, self.collate, self.seed = split, collate, 0
        self.reader = _reader_of(split, device, find_fault, read_ahead_mib)
        self.loader: Iterator[MicroBatch] | None = None  # of a stream, which continues from epoch to epoch

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, request: Request) -> MicroBatch:
        found = self.reader.read(self.split.rows_of(request.indices), request, self.seed)
        inputs, targets = found if isinstance(found, tuple) else self._joined(found, request)
        return MicroBatch(
            inputs,
            targets,
            len(request.indices),
            request.global_size,
            request.ends_step,
            request.is_filler,
            self.reader.read_to if request.ends_step else None,
        )

    def _joined(self, items: Iterator[Pair], request: Request) -> Pair:
        """Read and transform items, and join them into a batch."""
        indices = self.split.indices_of(request.indices)
        examples = self._examples(items, indices, request.first_draw)
        try:
            joined = None if self.collate is None else self.collate(examples)
        except StopIteration as error:  # a DataLoader would take it for the data's end
            raise ExampleError("collate has raised StopIteration") from error
        try:
            inputs, targets = default_collate(examples) if joined is None else joined
        except (RuntimeError, TypeError, ValueError) as error:
            if joined is not None:
                raise ExampleError("collate must return a pair (inputs, targets)") from error
            reason = _misfit(indices, examples) or first_line(error)
            remedy = "make them alike in the Dataset, or join them in the workload's collate()"
            raise ExampleError(f"{self.split.origin} examples do not fit together: {reason}; {remedy}") from error
        return inputs, targets

    def _examples(self, items: Iterator[Pair], indices: np.ndarray, first_draw: int | None) -> list[Pair]:
        """Read and transform items; ``indices`` are theirs in the field of ``Data``.

        Before each of them, the generators of Python, NumPy and torch are seeded. So an example's random numbers depend
        only on the seed and its index, not on interruptions, splits, or the number of ranks, tasks and loader
        processes. Of examples that are drawn by weight, the number of the draw counts instead of the index: one that is
        drawn again gets other random numbers.
        """
        split = self.split
        if not split.transforms and not self.reader.draws_numbers:
            return list(items)
        numbers = indices if first_draw is None else first_draw + np.arange(len(indices))
        examples = []
        for index, number in zip(indices.tolist(), numbers.tolist(), strict=True):
            seed_example(self.seed, number)
            with naming(split.origin, index):
                item = next(items)
                examples.append((split.transform(item[0]), item[1]) if split.transforms else item)
        return examples

    def read_ahead(self, config: TrainConfig, first_step: int, rank: int, world_size: int) -> None:
        """Read a rank's blocks, if there are any, ahead of its steps; ``first_step``: counted over all epochs.

        Raises ExampleError if there are fewer streams than workers.
        """
        if not isinstance(self.reader, BlockReader) or self.split.block_sizes is None:
            return
        if world_size > config.num_streams:
            streams = f"the {config.num_streams} streams of blocks; start a run with more num_streams, or fewer workers"
            raise ExampleError(f"{world_size} workers are more than {streams}")
        own, steps_per_pass = part_of(config.num_streams, rank, world_size), config.steps_per_pass(len(self))
        passes = range(first_step // steps_per_pass, math.ceil(config.total_steps(len(self)) / steps_per_pass))
        orders = (order_of(self.split, config, number) for number in passes)
        reads = (read for order in orders if isinstance(order, StreamOrder) for read in order.reads(own, first_step))
        self.reader.announce(reads, first_step)


def _reader_of(split: Split, device: torch.device, find_fault: FindFault, read_ahead_mib: int) -> Reader:
    if split.is_stream:
        return StreamReader(split)
    if split.is_in_blocks:
        return BlockReader(split, read_ahead_mib, find_fault)
    if isinstance(split.examples, Arrays) and not split.transforms:
        return ArrayReader(split, device)
    return ItemReader(split)


def _misfit(indices: np.ndarray, examples: list[Pair]) -> str:
    """Name the first example whose shapes differ from those of the batch's first example."""
    shapes = [tuple(map(np.shape, pytree.tree_leaves(example))) for example in examples]
    for index, shape in zip(indices.tolist(), shapes, strict=False):
        if shape != shapes[0]:
            return f"example {index} has shapes {shape}, example {indices[0]} has {shapes[0]}"
    return ""


def allow_read_only() -> None:
    """Silence torch about read-only arrays, such as those from the object store: nothing here writes to them."""
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def _begin_process(number: int) -> None:
    """Set up a loader process. A signal to all of the job's processes must not kill it: the job saves a checkpoint."""
    allow_read_only()
    os.setsid()
    if sys.platform == "linux":  # a job that is killed cannot stop this process
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def batch_loader(
    batches: Batches, requests: Iterable[Request], device: torch.device, num_processes: int = 0
) -> Iterable[MicroBatch]:
    """Return a loader that reads ``requests``. ``num_processes`` processes read a ``Dataset`` or mapped arrays ahead.

    Arrays on the device need no DataLoader. With ``batch_size=None``, it passes each request to the data set unchanged;
    by default, it would read the examples one by one and stack them.
    """
    reader = batches.reader
    if isinstance(reader, ArrayReader) and reader.is_whole and reader.device.type == device.type:
        return map(batches.__getitem__, requests)
    if batches.loader is not None:
        return batches.loader
    loader: DataLoader[MicroBatch] = DataLoader(
        # Of a copy: in a cycle of references, Python would close the loader's queues first, and its process last.
        copy.copy(batches),
        sampler=requests,
        batch_size=None,
        num_workers=num_processes if reader.max_processes is None else min(num_processes, reader.max_processes),
        pin_memory=device.type == "cuda",  # otherwise, it would only take up memory of the first GPU
        worker_init_fn=_begin_process,
    )
    if not batches.split.is_stream:
        return loader
    batches.loader = iter(loader)
    return batches.loader


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Return a batch on a device. A GPU copies pinned memory while this process continues."""
    if device.type == "cpu":
        return batch
    moved: MicroBatch = map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)
    return moved
