"""Random orders of examples, also of examples in blocks; any process can compute any part of an order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

_NUM_ROUNDS = 16
_WINDOW = 4  # blocks whose examples are shuffled together


def part_of(length: int, number: int, num_parts: int) -> range:
    """Return the places of the ``number``-th of ``num_parts`` parts of a sequence, which differ by at most one."""
    return range(length * number // num_parts, length * (number + 1) // num_parts)


class Shuffled:
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

    def __getitem__(self, places: slice) -> np.ndarray:
        """Return the numbers at the positions of a slice, (stop - start,)."""
        drawn = self._permuted(np.arange(*places.indices(self._number), dtype=np.uint64))
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
    """The numbers below ``number`` without ``left_out``, in order, computed when needed to save memory."""

    def __init__(self, number: int, left_out: np.ndarray) -> None:
        self._number = number
        self._left_out = np.sort(left_out)
        self._before = self._left_out - np.arange(len(left_out))  # how many numbers stay before each left-out number

    def __len__(self) -> int:
        return self._number - len(self._before)

    def __getitem__(self, places: ArrayLike) -> np.ndarray:
        """Return the numbers at one or more positions."""
        return np.add(places, np.searchsorted(self._before, places, side="right"))

    def rank(self, numbers: np.ndarray) -> np.ndarray:
        """Return how many of these numbers are below each of ``numbers``."""
        return numbers - np.searchsorted(self._left_out, numbers)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[np.arange(len(self))], dtype)


class Read(NamedTuple):
    """A block that the examples of some steps are in. Steps are counted over all epochs."""

    first_step: int
    last_step: int
    block: int


class Stream(NamedTuple):
    """A part of the row of blocks, from which each batch takes as many examples."""

    number: int
    start: int  # place in the row
    stop: int
    width: int  # examples of a full batch
    offset: int  # where they begin within a full batch, …
    offset_of_last: int  # … and within the last batch, which may be smaller


class StreamOrder:
    """An epoch's order of a split's examples, which are in blocks. Its slices are arrays of indices of the split.

    The blocks are permuted into a row. Stream c is the c-th of ``num_streams`` almost equal parts of it; a block at a
    border belongs to two streams. Within a stream, the examples of each four blocks are shuffled. A batch takes its
    c-th part from stream c (MosaicML's Streaming calls streams "canonical nodes"). So the batches do not depend on the
    number of workers, and a worker that always takes the same parts reads only its own streams.
    """

    def __init__(self, sizes: np.ndarray, batch_size: int, num_streams: int, seed: int, epoch: int) -> None:
        self.num_streams = num_streams
        self._batch_size, self._key = batch_size, (seed, epoch)
        blocks = Shuffled(len(sizes), self._key)[:]
        self._blocks = blocks[sizes[blocks] > 0]
        self._firsts = (np.cumsum(sizes) - sizes)[self._blocks]  # the index of each block's first example
        self._edges = np.append(0, np.cumsum(sizes[self._blocks]))  # of the blocks in the row
        self._num_full, num_last = divmod(len(self), batch_size)  # batches, examples
        self._first_step = epoch * (self._num_full + (num_last > 0))
        self._streams = list(self._streams_for(num_last))

    def _streams_for(self, num_last: int) -> Iterator[Stream]:
        start = 0
        for number in range(self.num_streams):
            in_full, in_last = (part_of(size, number, self.num_streams) for size in (self._batch_size, num_last))
            stop = start + self._num_full * len(in_full) + len(in_last)
            yield Stream(number, start, stop, len(in_full), in_full.start, in_last.start)
            start = stop

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getitem__(self, places: slice) -> np.ndarray:
        """Return the indices of the examples at the places of a slice, (stop - start,)."""
        start, stop, _ = places.indices(len(self))
        steps, within = np.divmod(np.arange(start, stop), self._batch_size)
        of_full = np.searchsorted([stream.offset for stream in self._streams], within, side="right") - 1
        of_last = np.searchsorted([stream.offset_of_last for stream in self._streams], within, side="right") - 1
        numbers = np.where(steps == self._num_full, of_last, of_full)
        indices = np.empty(len(steps), np.int64)
        for number in np.unique(numbers).tolist():
            stream, own = self._streams[number], np.flatnonzero(numbers == number)
            step, place = int(steps[own[0]]), int(within[own[0]])
            offset = stream.offset_of_last if step == self._num_full else stream.offset
            first = stream.start + step * stream.width + place - offset
            indices[own] = self._of_stream(stream, first, first + len(own))  # they follow each other in the row
        return indices

    def _of_stream(self, stream: Stream, first: int, end: int) -> np.ndarray:
        """Return the indices of a stream's examples at the places ``first`` to ``end - 1`` of the row."""
        first_block, drawn = self._block_at(stream.start), []
        windows = [(self._block_at(place) - first_block) // _WINDOW for place in (first, end - 1)]
        for number in range(windows[0], windows[1] + 1):
            start, stop = self._window(stream, number)
            shuffled = Shuffled(stop - start, [*self._key, stream.number, number])
            drawn.append(start + shuffled[max(first, start) - start : min(end, stop) - start])
        places = np.concatenate(drawn)
        blocks = self._block_at(places)
        return self._firsts[blocks] + places - self._edges[blocks]

    def reads(self, streams: Iterable[int], first_step: int) -> list[Read]:
        """Return the reads of some streams for the steps from ``first_step`` on, in the order of need."""
        found = []
        for stream in (self._streams[number] for number in streams):
            num_blocks = self._block_at(stream.stop - 1) + 1 - self._block_at(stream.start)
            for window in range(-(-num_blocks // _WINDOW)):
                first, last = self._window(stream, window)
                steps = self._step_of(stream, first), self._step_of(stream, last - 1)
                if first < last and steps[1] >= first_step:
                    blocks = self._blocks[self._block_at(first) : self._block_at(last - 1) + 1]
                    found += [Read(*steps, block) for block in blocks.tolist()]
        return sorted(found)

    def _block_at(self, place: Any) -> Any:
        """Return the number, in the row, of the block at one or more places of the row."""
        return np.searchsorted(self._edges, place, side="right") - 1

    def _window(self, stream: Stream, number: int) -> tuple[int, int]:
        """Return where a window of a stream begins and ends in the row."""
        first_block = self._block_at(stream.start) + number * _WINDOW
        first, last = self._edges[first_block], self._edges[min(first_block + _WINDOW, len(self._edges) - 1)]
        return int(max(first, stream.start)), int(min(last, stream.stop))

    def _step_of(self, stream: Stream, place: int) -> int:
        """Return the step that needs the example at a stream's place in the row."""
        in_full = (place - stream.start) // stream.width if stream.width else self._num_full
        return int(self._first_step + min(in_full, self._num_full))
