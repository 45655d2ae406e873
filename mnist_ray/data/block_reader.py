"""Reads blocks in threads: in an announced order, ahead of training; or when they are needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from torch.utils import _pytree as pytree

from mnist_ray.data.data import Arrays, Split
from mnist_ray.data.order import Read
from mnist_ray.errors import ExampleError, JobError, UsageError, first_line
from mnist_ray.storage import STORAGE_ERRORS, with_retries

Content = tuple[Any, int]  # a block's examples, Arrays or pairs (input, target), and their size in bytes
_NUM_SIZED = 32  # examples of a block, from whose sizes that of the block is estimated: each takes microseconds
_NUM_THREADS = 8  # they mostly wait for the storage


class BlockReader:
    """Reads the blocks of a split, and holds some of them in at most ``max_mib`` of memory."""

    def __init__(self, split: Split, max_mib: int) -> None:
        self._split, self._max_mib = split, max_mib
        self._threads = ThreadPoolExecutor(_NUM_THREADS)
        self._held = dict[int, Future[Content]]()  # by block
        self._largest = 0  # block so far, in bytes

    def examples_of(self, blocks: Sequence[int], *, ends_step: bool) -> dict[int, Any]:
        """Return the examples of the blocks that a micro-batch needs, by block. Raises JobError and ExampleError.

        ``ends_step``: whether it is the rank's last micro-batch of the step.
        """
        raise NotImplementedError

    def _start(self, block: int) -> None:
        if block not in self._held:
            self._held[block] = self._threads.submit(_read, self._split, block)

    def _examples(self, block: int) -> Any:
        examples, num_bytes = self._held[block].result()
        self._largest = max(self._largest, num_bytes)
        return examples

    def _has_room(self) -> bool:
        """Return whether one more block, as large as the largest so far, fits into the memory."""
        return 0 < (len(self._held) + 1) * self._largest <= self._max_mib * 2**20


class OnDemand(BlockReader):
    """Reads blocks when they are needed and, if they are needed in order, the next one as well."""

    def __init__(self, split: Split, max_mib: int, sizes: np.ndarray | None) -> None:
        """``sizes``: the number of the split's examples in each block; None if blocks are needed in random order."""
        super().__init__(split, max_mib)
        self._sizes = sizes

    def examples_of(self, blocks: Sequence[int], *, ends_step: bool) -> dict[int, Any]:
        """Return the examples like ``BlockReader``."""
        examples = self._in_no_order if self._sizes is None else self._in_order
        return {block: examples(block) for block in blocks}

    def _in_order(self, block: int) -> Any:
        assert self._sizes is not None
        wanted = [block, *([block + 1] if self._sizes[block + 1 : block + 2].any() else [])]
        self._held = {number: held for number, held in self._held.items() if number in wanted}
        for number in wanted:
            self._start(number)
        return self._examples(block)

    def _in_no_order(self, block: int) -> Any:
        if block not in self._held and not self._has_room():
            self._held = {}
        self._start(block)
        return self._examples(block)


class ReadAhead(BlockReader):
    """Reads blocks in the order of their ``reads``, as far ahead as the memory allows.

    Steps are counted over all epochs; ``first_step`` is the next one.
    """

    def __init__(self, split: Split, max_mib: int, reads: Iterator[Read], first_step: int) -> None:
        super().__init__(split, max_mib)
        self._reads, self._step = reads, first_step
        self._next = next(reads, None)
        self._needed = dict[int, Read]()  # by held block: from which step to which

    def examples_of(self, blocks: Sequence[int], *, ends_step: bool) -> dict[int, Any]:
        """Return the examples like ``BlockReader``, after starting to read ahead."""
        self._forget()
        self._check_memory()
        while self._next is not None and (self._next.first_step <= self._step or self._has_room()):
            self._hold(self._next)
            self._next = next(self._reads, None)
        for block in blocks:
            if block not in self._held:  # of a filler, from another rank's stream
                self._hold(Read(self._step, self._step, block))
        examples = {block: self._examples(block) for block in blocks}
        self._step += ends_step
        return examples

    def _hold(self, read: Read) -> None:
        before = self._needed.get(read.block, read)  # two streams may share a block
        self._needed[read.block] = before._replace(last_step=max(before.last_step, read.last_step))
        self._start(read.block)

    def _forget(self) -> None:
        """Forget the blocks that no step needs any more."""
        self._needed = {block: read for block, read in self._needed.items() if read.last_step >= self._step}
        self._held = {block: held for block, held in self._held.items() if block in self._needed}

    def _check_memory(self) -> None:
        """Raise ExampleError if the blocks that one step needs exceed the memory."""
        used = [self._held[block] for block, read in self._needed.items() if read.first_step < self._step]
        sizes = [held.result()[1] for held in used if held.done()]
        if (num_mib := sum(sizes) / 2**20) > self._max_mib:
            mib = f"{num_mib:,.0f} MiB in all, more than read_ahead_mib {self._max_mib}"
            remedy = "raise it, write smaller blocks (row groups), or start a run with fewer num_streams"
            raise ExampleError(f"a step needs {len(sizes)} blocks at a time, {mib}; {remedy}")


def _read(split: Split, block: int) -> Content:
    name, size = f"{split.origin} block {block}", int(split.examples.sizes[block])
    try:
        examples = with_retries(lambda: split.examples.read(block))
    except STORAGE_ERRORS as error:  # a retry may succeed
        raise JobError(f"{name} cannot be read: {first_line(error)}") from error
    except (UsageError, JobError) as error:  # of Parquet; its cause may be in the user's decode
        raise ExampleError(str(error)) from error.__cause__
    except Exception as error:
        raise ExampleError(f"{name} cannot be read: {type(error).__name__}: {first_line(error)}") from error
    if len(examples) != size:
        raise ExampleError(f"{name} has {len(examples):,} examples, but sizes has {size:,}")
    if isinstance(examples, Arrays):
        return examples, examples.nbytes
    some = [examples[index] for index in range(0, len(examples), max(1, len(examples) // _NUM_SIZED))]
    leaves = pytree.tree_leaves(some)
    num_bytes = sum(getattr(leaf, "nbytes", None) or sys.getsizeof(leaf) for leaf in leaves)
    return examples, num_bytes * len(examples) // max(1, len(some))
