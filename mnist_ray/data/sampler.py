"""Sharded sampling: each rank's slices of global batches that do not depend on the number of ranks.

A *batch* is global: the examples of one optimizer step, over all ranks. A rank's part of it is a *slice*. A rank
computes its slice in one *micro-batch* or, with ``--micro-batch-size``, in several. With ``--reproducible``, a batch is
cut into a fixed number of *chunks* instead of slices. Each rank has several chunks, and each chunk is a micro-batch
(``--micro-batch-size`` is then an error).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mnist_ray.data.order import Order, Shuffled, part_of

_DRAWN_AT_ONCE = 2**13  # examples of a pass's order; drawing one at a time takes 100 times as long


class Request(NamedTuple):
    """What the loader requests from a data set: a micro-batch, or an evaluation batch."""

    indices: np.ndarray
    global_size: int = 0  # number of examples in the whole batch, over all ranks; 0 in an evaluation
    ends_step: bool = True  # whether this is the rank's last micro-batch of the step
    is_filler: bool = False  # one example, which does not count, instead of an empty micro-batch
    first_draw: int | None = None  # of the pass, if it draws its examples: the number of this part's first draw


def split_bounds(num_examples: int, num_parts: int, batch_size: int) -> list[tuple[int, int]]:
    """Return (start, stop) of at most ``num_parts`` ranges of whole batches."""
    num_batches = math.ceil(num_examples / batch_size)
    num_parts = min(num_parts, num_batches)
    cuts = [num_batches * part // num_parts * batch_size for part in range(num_parts)] + [num_examples]
    return list(pairwise(cuts))


@dataclass(frozen=True)
class ShardedBatchSampler:
    """One rank's slices of the global batches of a pass over the data.

    The global batches depend only on the seed and the pass, never on the number of ranks: the pass's order is cut into
    batches, and rank r of w takes the r-th of each batch's w slices. So a run can resume at any ``first_step`` with any
    number of workers and see the same batches. Every rank takes all steps, if necessary with a filler.

    Of a batch of 10, 4 ranks take 2, 3, 2 and 3 examples. With ``--reproducible``, a batch has a fixed number of
    chunks. Data in blocks have a fixed number of streams, each with a part of every batch. Of 8 streams,
    3 ranks read 2, 3 and 3.
    """

    num_examples: int
    batch_size: int
    seed: int
    pass_number: int
    rank: int = 0
    world_size: int = 1
    first_step: int = 0
    num_chunks: int | None = None  # of a batch, with --reproducible; None: slices
    micro_batch_size: int | None = None  # the upper limit; None: no limit
    order: Order | None = None  # of a pass; None: a permutation. That of data in blocks has streams

    def __iter__(self) -> Iterator[Request]:
        # A rank's slice is one of world_size parts or, for data in blocks, its streams' parts. Chunks stay separate.
        order = self.order or Shuffled(self.num_examples, [self.seed, self.pass_number])
        num_parts = self.num_chunks or order.num_streams or self.world_size
        own = part_of(num_parts, self.rank, self.world_size)
        edges = (*own, own.stop) if self.num_chunks else (own.start, own.stop)
        for draw, batch in self._batches(order):
            bounds = [len(batch) * number // num_parts for number in edges]
            slices = [batch[first:last] for first, last in pairwise(bounds)]
            num_cuts = self._num_micro_batches(len(batch), num_parts)
            micro_batches = slices  # array_split would take 40 µs even for one cut
            if num_cuts > 1:
                micro_batches = [indices for part in slices for indices in np.array_split(part, num_cuts)]
            draw += bounds[0]
            for number, indices in enumerate(micro_batches, start=1):
                is_filler = len(indices) == 0
                ends_step = number == len(micro_batches)
                first_draw = draw if order.is_drawn else None
                yield Request(batch[:1] if is_filler else indices, len(batch), ends_step, is_filler, first_draw)
                draw += len(indices)

    def _num_micro_batches(self, size: int, num_parts: int) -> int:
        """Return how many micro-batches the largest slice needs: all ranks compute that many, as FSDP requires."""
        if self.micro_batch_size is None:
            return 1
        largest = math.ceil(size * math.ceil(num_parts / self.world_size) / num_parts)
        return math.ceil(largest / self.micro_batch_size)

    def _batches(self, order: Order) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each batch, with the number of its first example in the pass."""
        length = math.ceil(_DRAWN_AT_ONCE / self.batch_size) * self.batch_size
        for start in range(self.first_step * self.batch_size, self.num_examples, length):
            drawn = order[start : start + length]
            for first in range(0, len(drawn), self.batch_size):
                yield start + first, drawn[first : first + self.batch_size]
