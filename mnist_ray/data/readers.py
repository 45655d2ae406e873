"""Readers of a split's examples: rows of arrays, items of a ``Dataset``, blocks, or a stream."""

from __future__ import annotations

import bdb
import contextlib
import copy
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mnist_ray.data.data import Arrays, Split, map_arrays
from mnist_ray.data.order import Read
from mnist_ray.data.sampler import Request
from mnist_ray.data.tensors import map_tensors
from mnist_ray.errors import ExampleError, JobError, UsageError, first_line
from mnist_ray.storage import STORAGE_ERRORS, with_retries

FindFault = Callable[[Any], str]
Pair = tuple[Any, Any]
_PASSING = (MemoryError, ConnectionError, TimeoutError, bdb.BdbQuit)  # the last one ends a debugger
_MAX_PART_OF_GPU = 0.4  # of a GPU's free memory; activations and a second worker may need the rest
_NUM_SIZED = 32  # examples of a block, from whose sizes that of the block is estimated: each takes microseconds
_NUM_THREADS = 8  # they mostly wait for the storage
_NOTED_EVERY_S = 1.0  # a stream's state; a resumed run reads again what came after it
_END = object()


class Reader:
    """Reads the examples that a request is for."""

    device = torch.device("cpu")  # where arrays are
    max_processes: int | None = 0  # that may read ahead; None: as many as there are
    draws_numbers = False  # whether reading an example may draw random numbers
    read_to: dict[str, Any] | None = None  # of a stream: where a run that resumes after this step may go on reading

    def __init__(self, split: Split) -> None:
        self._split = split

    def read(self, rows: np.ndarray, request: Request, seed: int) -> Pair | Iterator[Pair]:
        """Return the examples at some rows of the split's ``examples``: joined (inputs, targets), or one by one.

        Raises ExampleError and JobError.
        """
        raise NotImplementedError


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch (that of the CPU), NumPy and Python."""
    torch.default_generator.manual_seed(seed)  # 100 times as fast as torch.manual_seed, which seeds all devices
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_example(seed: int, number: int) -> None:
    """Seed the global generators for an example: by its index, or by the number of its draw."""
    seed_generators((seed * 2_147_483_647 + number) % 2**63)


@contextlib.contextmanager
def naming(origin: str, index: int) -> Iterator[None]:
    """Turn what the user's code raises into an ExampleError that names the example, unless a retry may succeed."""
    try:
        yield
    except (Exception, SystemExit) as error:  # even StopIteration: a DataLoader would take it for the data's end
        if isinstance(error, (ExampleError, *_PASSING)) or getattr(error, "errno", None) is not None:
            raise
        kind = "" if isinstance(error, (OSError, SystemExit)) else f"{type(error).__name__}: "
        raise ExampleError(f"{origin} example {index} cannot be read: {kind}{first_line(error)}") from error


class ArrayReader(Reader):
    """Arrays without transforms. A whole split in memory is copied once to a GPU with enough memory."""

    def __init__(self, split: Split, device: torch.device) -> None:
        super().__init__(split)
        self._parts = (split.examples.inputs, split.examples.targets)
        self.is_whole = split.whole_arrays is not None
        if not self.is_whole:
            self.max_processes = None
            return
        if device.type != "cuda" or split.examples.nbytes <= _MAX_PART_OF_GPU * _free_bytes(device):
            self.device = device
        self._parts = tuple(map_arrays(self._tensor, part) for part in self._parts)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)  # on the CPU, a view

    def read(self, rows: np.ndarray, request: Request, seed: int) -> Pair:
        """Return the rows as tensors."""
        if not self.is_whole:
            # Into torch's memory, which always has the same alignment: the bits of a sum may depend on it. (np.take
            # would first copy an array whose rows overlap, or are not contiguous.)
            inputs, targets = (map_arrays(lambda array: torch.tensor(array[rows]), part) for part in self._parts)
            return inputs, targets
        chosen = torch.from_numpy(rows)
        if self.device.type == "cuda":
            chosen = chosen.pin_memory().to(self.device, non_blocking=True)
        inputs, targets = (map_tensors(lambda tensor: tensor[chosen], part) for part in self._parts)
        return inputs, targets


def _free_bytes(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # in PyTorch's cache


class ItemReader(Reader):
    """A ``Dataset``, or arrays with transforms, read item by item."""

    max_processes = None
    draws_numbers = True

    def read(self, rows: np.ndarray, request: Request, seed: int) -> Iterator[Pair]:
        """Read the items one by one."""
        return map(self._split.examples.__getitem__, rows.tolist())


class StreamReader(Reader):
    """A stream, whose examples have indices from 0 on. Requests must not go back."""

    max_processes = 1  # the others would read the same

    def __init__(self, split: Split) -> None:
        super().__init__(split)
        self._stream = split.examples
        self._items: Iterator[Any] | None = None
        self._batch: list[Any] = []  # the last one
        self._next = self._rounds = 0  # the index of the next example; how often the stream has begun again
        self._noted_s = 0.0

    def read(self, rows: np.ndarray, request: Request, seed: int) -> Iterator[Pair]:
        """Return the examples, after reading all before them."""
        size = request.global_size
        first = int(rows[0]) // size * size  # of the whole batch
        if self._items is None:
            self._begin()
        while self._next <= first:
            self._read_batch(size, seed)
        if request.ends_step:
            self._note_place()
        return iter([self._batch[row - first] for row in rows.tolist()])

    def _read_batch(self, size: int, seed: int) -> None:
        """Read the next batch, also what other ranks compute of it: a stream may draw random numbers on its way."""
        seed_example(seed, self._next)
        self._batch = []
        for index in range(self._next, self._next + size):
            with naming(self._split.origin, index):
                self._batch.append(self._next_item())
        self._next += size

    def _begin(self) -> None:
        if self.read_to is not None and self.read_to["state"] is not None:
            self._stream.source.load_state_dict(self.read_to["state"])
            self._next, self._rounds = self.read_to["next"], self.read_to["rounds"]
        self._items = iter(self._stream)

    def _next_item(self) -> Any:
        """Return the next example; at the end of the stream, begin again."""
        assert self._items is not None
        example = next(self._items, _END)
        if example is _END:
            self._items = self._stream.restarted()
            self._rounds += 1
            example = next(self._items, _END)
        if example is _END:
            raise ExampleError("the stream of training examples is empty")
        return example

    def _note_place(self) -> None:
        is_new = self.read_to is None or self._rounds != self.read_to["rounds"]
        if is_new or time.monotonic() - self._noted_s > _NOTED_EVERY_S:
            state = copy.deepcopy(self._stream.source.state_dict()) if self._stream.has_state else None
            self.read_to = {"next": self._next, "rounds": self._rounds, "state": state}
            self._noted_s = time.monotonic()


class BlockReader(Reader):
    """Blocks, which threads read and check: those of an announced order ahead of training, as far as memory allows.

    Without an announced order, as in an evaluation, they are read when they are needed, and the next one meanwhile.
    Steps are counted over all epochs.
    """

    def __init__(self, split: Split, max_mib: int, find_fault: FindFault) -> None:
        super().__init__(split)
        self._max_mib, self._find_fault = max_mib, find_fault
        self._sizes = split.block_sizes  # None if the indices are not sorted, with --overfit-batches
        self._edges = np.append(0, np.cumsum(split.examples.sizes))
        self._threads = ThreadPoolExecutor(_NUM_THREADS)
        self._is_announced = False
        self._reads: Iterator[Read] = iter(())
        self._next: Read | None = None
        self._step = 0  # the next one
        self._needed = dict[int, Read]()  # by held block: from which step to which
        self._held = dict[int, Future[tuple[Any, int]]]()  # by block: its examples, and their size in bytes
        self._largest = 0  # block so far, in bytes
        self._shapes = dict[str, tuple[str, Any]]()  # of the first block that any thread has read, with its name

    def announce(self, reads: Iterator[Read], first_step: int) -> None:
        """Read ahead from now on; requests are those of all steps from ``first_step`` on."""
        self._is_announced, self._step = True, first_step
        self._reads, self._next = reads, next(reads, None)

    def read(self, rows: np.ndarray, request: Request, seed: int) -> Pair | Iterator[Pair]:
        """Return the examples: joined, if the blocks have arrays and there are no transforms."""
        blocks = np.searchsorted(self._edges, rows, side="right") - 1
        rows = rows - self._edges[blocks]
        wanted = np.unique(blocks).tolist()
        self._hold(wanted)
        self._step += request.ends_step
        found = {block: self._held[block].result() for block in wanted}
        self._largest = max(self._largest, *(num_bytes for _, num_bytes in found.values()))
        examples_of = {block: examples for block, (examples, _) in found.items()}
        # Rows of several arrays are joined at once, unless a transform needs them one by one.
        are_arrays = all(isinstance(examples, Arrays) for examples in examples_of.values())
        if are_arrays and not self._split.transforms:
            return _rows_of_blocks(examples_of, blocks, rows)
        return iter([examples_of[block][row] for block, row in zip(blocks.tolist(), rows.tolist(), strict=True)])

    def _hold(self, wanted: list[int]) -> None:
        """Forget what no later step needs, and begin to read what is wanted now and what comes next."""
        self._needed = {block: read for block, read in self._needed.items() if read.last_step >= self._step}
        self._check_memory()
        while self._next is not None and (self._next.first_step <= self._step or self._has_room()):
            before = self._needed.get(self._next.block, self._next)  # two streams may share a block
            self._needed[self._next.block] = before._replace(last_step=max(before.last_step, self._next.last_step))
            self._next = next(self._reads, None)
        following = wanted[-1] + 1
        if not self._is_announced and self._sizes is not None and self._sizes[following : following + 1].any():
            wanted = [*wanted, following]
        for block in wanted:  # unless announced, as those of a filler, from another rank's stream
            self._needed.setdefault(block, Read(self._step, self._step, block))
        held = {block: self._held[block] for block in self._needed if block in self._held}
        self._held = held  # frees the others, before new ones are read
        self._held = {block: held.get(block) or self._threads.submit(self._read_block, block) for block in self._needed}

    def _has_room(self) -> bool:
        """Return whether one more block, as large as the largest so far, fits into the memory."""
        return 0 < (len(self._needed) + 1) * self._largest <= self._max_mib * 2**20

    def _check_memory(self) -> None:
        """Raise ExampleError if the blocks that one step needs exceed the memory."""
        used = [self._held[block] for block, read in self._needed.items() if read.first_step < self._step]
        if sum(held.result()[1] for held in used if held.done()) > self._max_mib * 2**20:
            num_mib = sum(held.result()[1] for held in used) / 2**20  # also of those that are still being read
            mib = f"{num_mib:,.0f} MiB in all, more than read_ahead_mib {self._max_mib}"
            remedy = "raise it, write smaller blocks (row groups), or start a run with fewer num_streams"
            raise ExampleError(f"a step needs {len(used)} blocks at a time, {mib}; {remedy}")

    def _read_block(self, block: int) -> tuple[Any, int]:
        source, name = self._split.examples, f"{self._split.origin} block {block}"
        try:
            examples = with_retries(lambda: source.read(block))
        except STORAGE_ERRORS as error:  # a retry may succeed
            raise JobError(f"{name} cannot be read: {first_line(error)}") from error
        except (UsageError, JobError) as error:  # of Parquet; its cause may be in the user's decode
            raise ExampleError(str(error)) from error.__cause__
        except Exception as error:
            raise ExampleError(f"{name} cannot be read: {type(error).__name__}: {first_line(error)}") from error
        if len(examples) != source.sizes[block]:
            raise ExampleError(f"{name} has {len(examples):,} examples, but sizes has {source.sizes[block]:,}")
        self._check(source.block_names[block] if source.block_names else f"block {block}", examples)
        return examples, _bytes_of(examples)

    def _check(self, name: str, examples: Any) -> None:
        """Raise ExampleError unless arrays are like those of the first block, and examples fit the workload."""
        fault = self._find_fault(examples)
        if isinstance(examples, Arrays):
            shapes = {part: array.shape[1:] for part, array in examples.named.items()}
            first, others = self._shapes.setdefault("first", (name, shapes))
            fault = f"has shapes {shapes}, but {first} has {others}" if shapes != others else fault
        if fault:
            remedy = "fix the code that reads it, or write it again and start another run"
            raise ExampleError(f"{name} {fault}; {remedy}")


def _rows_of_blocks(arrays_of: dict[int, Arrays], blocks: np.ndarray, rows: np.ndarray) -> Pair:
    """Return the inputs and targets of the examples at some rows of ``blocks``; ``arrays_of`` is sorted by block."""
    by_block = [arrays[rows[blocks == block]] for block, arrays in arrays_of.items()]
    back = torch.from_numpy(np.argsort(np.argsort(blocks, kind="stable")))  # from the blocks' order
    inputs, targets = pytree.tree_map(lambda *arrays: torch.from_numpy(np.concatenate(arrays))[back], *by_block)
    return inputs, targets


def _bytes_of(examples: Any) -> int:
    """Return the size of a block's examples, estimated from some of them unless they are arrays."""
    if isinstance(examples, Arrays):
        return examples.nbytes
    some = [examples[index] for index in range(0, len(examples), max(1, len(examples) // _NUM_SIZED))]
    leaves = pytree.tree_leaves(some)
    num_bytes = sum(getattr(leaf, "nbytes", None) or sys.getsizeof(leaf) for leaf in leaves)
    return num_bytes * len(examples) // max(1, len(some))
