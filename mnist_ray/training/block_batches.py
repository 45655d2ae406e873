"""Loading from blocks: threads read the blocks of the next steps, as far as they fit into a given memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mnist_ray.config import TrainConfig
from mnist_ray.errors import JobError, UsageError, first_line
from mnist_ray.storage import STORAGE_ERRORS, with_retries
from mnist_ray.training.batches import Batch, Collate, ExampleBatches, ExampleError
from mnist_ray.training.sampler import Slice, own_chunks
from mnist_ray.training.state import Group, TrainingState
from mnist_ray.workload.data import Arrays, Split
from mnist_ray.workload.order import Read, StreamOrder
from mnist_ray.workload.splits import sizes_in

_NUM_THREADS = 8  # they mostly wait for the storage
Content = tuple[Any, int]  # a block's examples, Arrays or pairs (input, target), and their bytes


class BlockBatches(ExampleBatches):
    """A split of ``Blocks``. Threads read the blocks of an announced order ahead; others are read when needed."""

    def __init__(self, split: Split, collate: Collate | None, read_ahead_mib: int) -> None:
        super().__init__(split, 0, collate)
        self._edges = np.append(0, np.cumsum(split.examples.sizes))
        self._sizes = sizes_in(split)
        self._most_mib = read_ahead_mib
        self._threads = ThreadPoolExecutor(_NUM_THREADS)
        self._held = dict[int, tuple[Read, Future[Content]]]()  # by block
        self._announced: Iterator[Read] | None = None
        self._next: Read | None = None
        self._step = 0  # over all epochs
        self._largest = 0  # block so far, in bytes

    def begin(self, config: TrainConfig, state: TrainingState, group: Group) -> StreamOrder | None:
        """Return the order of the state's epoch; None if the indices are not sorted, with ``--overfit-batches``."""
        if (sizes := self._sizes) is None:
            return None
        if group.world_size > config.num_chunks:
            most = f"the {config.num_chunks} streams of blocks; start a run with more --num-chunks, or fewer workers"
            raise ExampleError(f"{group.world_size} workers are more than {most}")

        def order(epoch: int) -> StreamOrder:
            return StreamOrder(sizes, config.batch_size, config.num_chunks, config.seed, epoch)

        if self._announced is None:  # the first epoch; the others follow without a wait
            self._step = first = state.total_step
            own = own_chunks(config.num_chunks, group.rank, group.world_size)
            epochs = range(state.epoch, config.num_epochs)
            self._announced = (read for epoch in epochs for read in order(epoch).reads(own, first))
            self._next = next(self._announced, None)
        return order(state.epoch)

    def __getitem__(self, chosen: Slice) -> Batch:
        places = self.split.places(chosen.indices)
        blocks = np.searchsorted(self._edges, places, side="right") - 1
        rows, by_block = places - self._edges[blocks], np.argsort(blocks, kind="stable")
        numbers, starts = np.unique(blocks[by_block], return_index=True)
        self._read_ahead()
        contents = {number: self._content(number) for number in numbers.tolist()}
        self._step += chosen.ends_step
        if all(isinstance(content, Arrays) for content in contents.values()):
            of_blocks = [*zip(contents.values(), np.split(rows[by_block], starts[1:]), strict=True)]
            back = torch.from_numpy(np.argsort(by_block))
            inputs = _together([content.inputs[some] for content, some in of_blocks])[back]
            targets = _together([content.targets[some] for content, some in of_blocks])[back]
            return Batch(inputs, targets, *chosen[1:])
        examples = [contents[block][row] for block, row in zip(blocks.tolist(), rows.tolist(), strict=True)]
        return self._joined(examples, places, chosen)

    def _content(self, block: int) -> Any:
        wanted = [block]
        if self._announced is None:  # in an evaluation, which reads the blocks in their order, or overfitting
            if self._sizes is not None and self._sizes[block + 1 : block + 2].any():
                wanted.append(block + 1)
            if self._sizes is not None or (block not in self._held and not self._fits()):
                self._held = {number: held for number, held in self._held.items() if number in wanted}
        for number in wanted:
            if number not in self._held:
                self._start(Read(self._step, self._step, number))
        content, num_bytes = self._held[block][1].result()
        self._largest = max(self._largest, num_bytes)
        return content

    def _read_ahead(self) -> None:
        """Forget the blocks that no step needs any more, and start to read the next ones."""
        if self._announced is None:
            return
        self._held = {block: held for block, held in self._held.items() if held[0].last_step >= self._step}
        used = [task for read, task in self._held.values() if read.first_step < self._step]
        needed = [task.result()[1] for task in used if task.done()]
        if (num_mib := sum(needed) / 2**20) > self._most_mib:
            mib = f"{num_mib:,.0f} MiB, above --read-ahead-mib {self._most_mib}"
            remedy = "raise it, write smaller blocks (row groups), or start a run with fewer --num-chunks"
            raise ExampleError(f"a step needs {len(needed)} blocks at a time, in all {mib}; {remedy}")
        while self._next is not None and (self._next.first_step <= self._step or self._fits()):
            self._start(self._next)
            self._next = next(self._announced, None)

    def _fits(self) -> bool:
        """Return whether one more block, as large as the largest so far, fits into the memory."""
        return 0 < (len(self._held) + 1) * self._largest <= self._most_mib * 2**20

    def _start(self, read: Read) -> None:
        before, future = self._held.get(read.block, (read, None))  # two streams may share a block
        read = read._replace(last_step=max(before.last_step, read.last_step))
        self._held[read.block] = read, future or self._threads.submit(self._read, read.block)

    def _read(self, block: int) -> Content:
        name, size = f"{self.split.origin} block {block}", self._edges[block + 1] - self._edges[block]
        try:
            examples = with_retries(lambda: self.split.examples.read(block))
        except STORAGE_ERRORS:
            raise
        except (UsageError, JobError) as error:  # of Parquet; its cause may be in the user's decode
            raise ExampleError(str(error)) from error.__cause__
        except Exception as error:
            raise ExampleError(f"{name} cannot be read: {type(error).__name__}: {first_line(error)}") from error
        if len(examples) != size:
            raise ExampleError(f"{name} has {len(examples):,} examples, not {size:,}")
        if isinstance(examples, Arrays):
            return examples, examples.inputs.nbytes + examples.targets.nbytes
        return examples, sum(getattr(leaf, "nbytes", 0) for leaf in pytree.tree_leaves(examples))


def _together(parts: Sequence[np.ndarray]) -> Tensor:
    """Return the rows of several blocks as one tensor."""
    try:
        return torch.from_numpy(np.concatenate(parts))
    except ValueError as error:
        raise ExampleError(f"the shapes of blocks do not fit together: {first_line(error)}") from error
