"""Random orders of examples; any process can compute any part of an order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

_NUM_ROUNDS = 16


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
