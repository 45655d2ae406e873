"""A random order of any number of examples, of which any piece can be drawn by itself, in any process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

LARGEST_IN_MEMORY = 2**17
"""Examples whose order is drawn as a whole, as NumPy permutes: in two milliseconds, into a megabyte."""
KIND = "feistel-16"
"""How the order of more is drawn. A run that began with another does not go on with this one."""
_NUM_ROUNDS = 16


class Shuffled:
    """The numbers below ``number`` in the order that ``key`` decides; slices of it are arrays.

    Of up to ``in_memory`` numbers it is a permutation by NumPy. Of more, memory and time would grow with them, so each
    is computed from its place, by a Feistel network: it permutes the numbers below a power of two, in which each half
    of a number's bits is changed in turn by a hash of the other half. What falls outside is permuted again until it
    falls inside, which keeps the whole a permutation ("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite
    Domains, 2002). Such orders are as good as others to train by (Mitchell et al., https://arxiv.org/abs/2106.06161).
    """

    def __init__(self, number: int, key: Sequence[int], in_memory: int = LARGEST_IN_MEMORY) -> None:
        self._number = number
        self._key = tuple(key)
        self._is_in_memory = number <= in_memory

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, places: slice) -> np.ndarray:
        """Return the numbers at a slice's places, (stop - start,)."""
        if self._is_in_memory:
            return self._whole[places]
        drawn = self._permuted(np.arange(*places.indices(self._number), dtype=np.uint64))
        while len(outside := np.flatnonzero(drawn >= self._number)):
            drawn[outside] = self._permuted(drawn[outside])
        return drawn.astype(np.int64)

    @cached_property
    def _whole(self) -> np.ndarray:
        return np.random.default_rng(self._key).permutation(self._number)

    @cached_property
    def _round_keys(self) -> np.ndarray:
        return np.random.SeedSequence(self._key).generate_state(_NUM_ROUNDS, np.uint64)

    def _permuted(self, numbers: np.ndarray) -> np.ndarray:
        """Permute numbers below the least power of two that is not below ``number``."""
        bits = max((self._number - 1).bit_length(), 2)
        low_bits, high_bits = bits // 2, bits - bits // 2
        low, high = numbers & np.uint64(2**low_bits - 1), numbers >> np.uint64(low_bits)
        for first, second in self._round_keys.reshape(-1, 2):
            high ^= _hashed(low, first, high_bits)
            low ^= _hashed(high, second, low_bits)
        return high << np.uint64(low_bits) | low


def _hashed(values: np.ndarray, key: np.uint64, bits: int) -> np.ndarray:
    """Return ``bits`` bits of each value, by the steps of SplitMix64 (Steele, Lea and Flood, 2014)."""
    mixed = values + key
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed >> np.uint64(64 - bits)


class AllBut:
    """The numbers below ``number`` but for some, in order: an array of indices that takes no memory for each."""

    def __init__(self, number: int, left_out: np.ndarray) -> None:
        self._number = number
        self._before = np.sort(left_out) - np.arange(len(left_out))  # of those that stay, before each that does not

    def __len__(self) -> int:
        return self._number - len(self._before)

    def __getitem__(self, places: ArrayLike) -> np.ndarray:
        """Return the numbers at some places, or at one."""
        return np.add(places, np.searchsorted(self._before, places, side="right"))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[np.arange(len(self))], dtype)
