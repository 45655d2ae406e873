"""Random orders of examples, also of examples in blocks; any process can compute any part of an order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

_NUM_ROUNDS = 16
_WINDOW = 4  # blocks whose examples are shuffled together


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
        self._num_full, rest = divmod(len(self), batch_size)  # batches
        self._first_step = epoch * (self._num_full + (rest > 0))
        cuts = np.arange(num_streams + 1) * np.array([[batch_size], [rest]]) // num_streams
        self._parts = cuts[:, :-1]  # where each stream's part of a full batch begins, and of the last one
        self._widths = np.diff(cuts[0])  # examples that each stream gives to a full batch
        lengths = self._num_full * self._widths + np.diff(cuts[1])
        self._bounds = np.append(0, np.cumsum(lengths))  # of the streams in the row
        self._first_blocks = self._block_at(self._bounds)

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getitem__(self, places: slice) -> np.ndarray:
        """Return the indices of the examples at the places of a slice, (stop - start,)."""
        start, stop, _ = places.indices(len(self))
        steps, within = np.divmod(np.arange(start, stop), self._batch_size)
        is_last = steps == self._num_full
        of_full, of_last = (np.searchsorted(parts, within, side="right") - 1 for parts in self._parts)
        streams = np.where(is_last, of_last, of_full)
        at = self._bounds[streams] + steps * self._widths[streams] + within - self._parts[is_last.astype(int), streams]
        windows = (self._block_at(at) - self._first_blocks[streams]) // _WINDOW
        groups = streams * len(self._edges) + windows
        for group in np.unique(groups).tolist():
            own = np.flatnonzero(groups == group)  # their places in the row follow each other
            stream, window = divmod(group, len(self._edges))
            first, last = self._window(stream, window)
            shuffled = Shuffled(last - first, [*self._key, stream, window])
            at[own] = first + shuffled[at[own[0]] - first : at[own[-1]] - first + 1]
        blocks = self._block_at(at)
        return self._firsts[blocks] + at - self._edges[blocks]

    def reads(self, streams: Iterable[int], first_step: int) -> list[Read]:
        """Return the reads of some streams for the steps from ``first_step`` on, in the order of need."""
        found = []
        for stream in streams:
            num_blocks = self._block_at(self._bounds[stream + 1] - 1) + 1 - self._first_blocks[stream]
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

    def _window(self, stream: int, number: int) -> tuple[int, int]:
        """Return where a window of a stream begins and ends in the row."""
        first_block = self._first_blocks[stream] + number * _WINDOW
        first, last = self._edges[first_block], self._edges[min(first_block + _WINDOW, len(self._edges) - 1)]
        return int(max(first, self._bounds[stream])), int(min(last, self._bounds[stream + 1]))

    def _step_of(self, stream: int, place: int) -> int:
        """Return the step that needs the example at a place of a stream."""
        width = self._widths[stream]
        in_full = (place - self._bounds[stream]) // width if width else self._num_full
        return int(self._first_step + min(in_full, self._num_full))
