"""Random orders of examples, also of examples in blocks; any process can compute any part of an order."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

_NUM_ROUNDS = 16
_WINDOW = 4  # blocks whose examples are shuffled together


def part_of(length: int, number: int, num_parts: int) -> range:
    """Return the positions of one of ``num_parts`` parts of a sequence; the parts' lengths differ by at most one."""
    return range(length * number // num_parts, length * (number + 1) // num_parts)


class Order:
    """The order of a pass: a function of the seed, the pass and the position, and nothing else."""

    num_streams: int | None = None  # of data in blocks, each with a part of every batch
    is_drawn = False  # whether an example may come several times

    def __getitem__(self, positions: slice) -> np.ndarray:
        """Return the indices of the examples at the positions of a slice, (stop - start,)."""
        raise NotImplementedError


class InOrder(Order):
    """The numbers from 0 on, as the order of a stream."""

    def __getitem__(self, positions: slice) -> np.ndarray:
        return np.arange(positions.start, positions.stop)


class Shuffled(Order):
    """A permutation of the numbers below ``number``, decided by ``key``. Its slices are arrays.

    Each number is computed from its position alone, so memory does not grow with ``number``. A Feistel network permutes
    the numbers below a power of two: a hash of one half of a number's bits changes the other half, alternately. A
    result that is too large is permuted again until it is below ``number`` ("cycle walking": Black and Rogaway, Ciphers
    with Arbitrary Finite Domains, 2002). Training is as good as with true shuffling (https://arxiv.org/abs/2106.06161).
    """

    def __init__(self, number: int, key: Sequence[int]) -> None:
        self._number = number
        self._round_keys = np.random.SeedSequence(key).generate_state(_NUM_ROUNDS, np.uint64).reshape(-1, 2)

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, positions: slice) -> np.ndarray:
        """Return the numbers at the positions of a slice, (stop - start,)."""
        drawn = self._permuted(np.arange(*positions.indices(self._number), dtype=np.uint64))
        while len(outside := np.flatnonzero(drawn >= self._number)):
            drawn[outside] = self._permuted(drawn[outside])
        return drawn.astype(np.int64)

    def _permuted(self, numbers: np.ndarray) -> np.ndarray:
        """Permute numbers below the next power of two."""
        bits = max((self._number - 1).bit_length(), 2)
        low_bits, high_bits = bits // 2, bits - bits // 2
        low, high = numbers & np.uint64(2**low_bits - 1), numbers >> np.uint64(low_bits)
        for first, second in self._round_keys:
            high ^= _hashed(low, first, high_bits)
            low ^= _hashed(high, second, low_bits)
        return high << np.uint64(low_bits) | low


class Drawn(Order):
    """Numbers drawn with replacement, in proportion to ``weights`` (N,), decided by ``key``. Its slices are arrays.

    Each is computed from its position alone, like those of ``Shuffled``.
    """

    is_drawn = True

    def __init__(self, weights: np.ndarray, key: Sequence[int]) -> None:
        self._edges = np.cumsum(weights, dtype=np.float64)
        self._key = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]

    def __len__(self) -> int:
        return len(self._edges)

    def __getitem__(self, positions: slice) -> np.ndarray:
        """Return the numbers at the positions of a slice, (stop - start,)."""
        drawn = _hashed(np.arange(*positions.indices(len(self)), dtype=np.uint64), self._key, 53) / 2.0**53
        last = np.searchsorted(self._edges, self._edges[-1])  # rounding could lead beyond it
        return np.minimum(np.searchsorted(self._edges, drawn * self._edges[-1], side="right"), last)


def _hashed(values: np.ndarray, key: np.uint64, bits: int) -> np.ndarray:
    """Hash each value to ``bits`` bits, by the steps of SplitMix64 (Steele, Lea and Flood, 2014)."""
    mixed = values + key
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed >> np.uint64(64 - bits)


class AllBut:
    """The numbers below ``number`` except ``left_out``, in order; not stored, as an array takes 8 bytes each."""

    def __init__(self, number: int, left_out: np.ndarray) -> None:
        self._number = number
        self._left_out = np.sort(left_out)
        self._before = self._left_out - np.arange(len(left_out))  # how many numbers stay before each left-out number

    def __len__(self) -> int:
        return self._number - len(self._before)

    def __getitem__(self, positions: ArrayLike) -> np.ndarray:
        """Return the numbers at one or more positions."""
        return np.add(positions, np.searchsorted(self._before, positions, side="right"))

    def rank(self, numbers: np.ndarray) -> np.ndarray:
        """Return how many of these numbers are below each of ``numbers``."""
        return numbers - np.searchsorted(self._left_out, numbers)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[np.arange(len(self))], dtype)


class Read(NamedTuple):
    """A block that holds examples of some steps. Steps are counted over all epochs."""

    first_step: int
    last_step: int
    block: int


class Stream(NamedTuple):
    """A part of the row of blocks; each full batch takes the same number of examples from it."""

    number: int
    width: int  # that number; it may differ for the last batch
    edges: list[int]  # the positions in the row where its windows begin, and where the last one ends


class StreamOrder(Order):
    """The order of a split's examples in blocks, for one pass over the data. Its slices are arrays of indices.

    The blocks are permuted into a row, which is cut into ``num_streams`` almost equal streams; a block at a border
    belongs to two. Within a stream, the examples of every four blocks, a *window*, are shuffled. A batch takes its c-th
    part from stream c (MosaicML's Streaming calls streams "canonical nodes"). So batches do not depend on the number of
    workers, and a worker that always takes the same parts reads only its own streams.
    """

    num_streams: int

    def __init__(self, sizes: np.ndarray, batch_size: int, num_streams: int, seed: int, pass_number: int) -> None:
        self.num_streams = num_streams
        self._batch_size, self._key = batch_size, (seed, pass_number)
        blocks = Shuffled(len(sizes), self._key)[:]
        self._blocks = blocks[sizes[blocks] > 0]
        self._firsts = (np.cumsum(sizes) - sizes)[self._blocks]  # the index of each block's first example
        self._edges = np.append(0, np.cumsum(sizes[self._blocks]))  # of the blocks in the row
        self._num_full, num_last = divmod(len(self), batch_size)  # batches, examples
        self._first_step = pass_number * (self._num_full + (num_last > 0))
        self._streams = list(self._streams_for(num_last))

    def _streams_for(self, num_last: int) -> Iterator[Stream]:
        start = 0
        for number in range(self.num_streams):
            in_full, in_last = (len(part_of(size, number, self.num_streams)) for size in (self._batch_size, num_last))
            stop = start + self._num_full * in_full + in_last
            first_block, last_block = self._block_at(start), self._block_at(stop - 1)
            within = self._edges[first_block + _WINDOW : last_block + 1 : _WINDOW].tolist()
            yield Stream(number, in_full, [start, *within, stop] if start < stop else [start])
            start = stop

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getitem__(self, positions: slice) -> np.ndarray:
        """Return the indices of the examples at the positions of a slice, (stop - start,)."""
        start, stop, _ = positions.indices(len(self))
        steps = range(start // self._batch_size, math.ceil(stop / self._batch_size))
        of_streams = [self._parts(stream, steps) for stream in self._streams]
        batches = [part for of_step in zip(*of_streams, strict=True) for part in of_step]
        first = steps.start * self._batch_size
        return np.concatenate(batches)[start - first : stop - first]

    def _parts(self, stream: Stream, steps: range) -> list[np.ndarray]:
        """Return the indices that a stream gives to each of some steps of the pass."""
        start, stop = (stream.edges[0] + stream.width * step for step in (steps.start, steps.stop))
        stop = stream.edges[-1] if steps.stop > self._num_full else stop
        drawn = [np.empty(0, np.int64)]
        for number in range(bisect_right(stream.edges, start) - 1, bisect_left(stream.edges, stop)):
            first, end = stream.edges[number : number + 2]
            shuffled = Shuffled(end - first, [*self._key, stream.number, number])
            drawn.append(first + shuffled[max(start, first) - first : min(stop, end) - first])
        positions = np.concatenate(drawn)
        blocks = self._block_at(positions)
        indices = self._firsts[blocks] + positions - self._edges[blocks]
        return np.split(indices, stream.width * np.arange(1, len(steps)))

    def reads(self, streams: Iterable[int], first_step: int) -> list[Read]:
        """Return the reads of some streams for the steps from ``first_step`` on, in the order of need."""
        found = []
        for stream in (self._streams[number] for number in streams):
            for start, stop in pairwise(stream.edges):
                steps = self._step_of(stream, start), self._step_of(stream, stop - 1)
                if steps[1] >= first_step:
                    blocks = self._blocks[self._block_at(start) : self._block_at(stop - 1) + 1]
                    found += [Read(*steps, block) for block in blocks.tolist()]
        return sorted(found)

    def _block_at(self, position: Any) -> Any:
        """Return the number, in the row, of the block at one or more positions of the row."""
        return np.searchsorted(self._edges, position, side="right") - 1

    def _step_of(self, stream: Stream, position: int) -> int:
        """Return the step, counted over all epochs, that needs a stream's example at a position of the row."""
        in_full = (position - stream.edges[0]) // stream.width if stream.width else self._num_full
        return int(self._first_step + min(in_full, self._num_full))
