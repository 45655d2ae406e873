import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from mnist_ray.data.order import AllBut, Shuffled


@pytest.mark.parametrize("number", [1, 2, 3, 7, 100, 4097, 2**17 + 5])
def test_every_number_has_one_place(number: int) -> None:
    order = Shuffled(number, [3, 1])
    assert len(order) == number
    np.testing.assert_array_equal(np.sort(order[:]), np.arange(number))


def test_a_stretch_is_what_the_whole_has_there() -> None:
    whole = Shuffled(1000, [3, 1])[:]
    stretches = [Shuffled(1000, [3, 1])[start : start + 64] for start in range(0, 1000, 64)]
    np.testing.assert_array_equal(np.concatenate(stretches), whole)
    assert len(stretches[-1]) == 1000 % 64


def test_all_orders_of_four_numbers_are_as_frequent() -> None:
    counts = Counter(tuple(Shuffled(4, [seed])[:].tolist()) for seed in range(2400))
    expected = 2400 / math.factorial(4)
    # Chi-squared with 23 degrees of freedom: of fair orders one draw in a thousand lies beyond.
    assert sum((counts[order] - expected) ** 2 / expected for order in itertools.permutations(range(4))) < 49.7


@pytest.mark.parametrize("number", [20_000, 65_536, 65_537])
def test_places_are_not_correlated_between_epochs_and_seeds_nor_with_their_neighbours(number: int) -> None:
    orders = [Shuffled(number, key)[:] for key in ([0, 0], [0, 1], [1, 0], [1, 1])]
    pairs = [*itertools.combinations([np.arange(number), *orders], 2)]
    pairs += [(order[:-1], order[1:]) for order in orders]
    for first, second in pairs:
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(number)


def test_any_stretch_of_an_order_is_from_all_over_the_numbers() -> None:
    for stretch in np.split(Shuffled(2**18, [0, 0])[:], 256):
        counts = np.histogram(stretch, 16, (0, 2**18))[0]
        assert ((counts - 64) ** 2 / 64).sum() < 45  # chi-squared, 15 degrees of freedom: one in ten thousand


def test_the_order_of_a_billion_takes_no_memory_for_each() -> None:
    tracemalloc.start()
    stretch = Shuffled(10**9, [0, 0])[999_999_000:]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(stretch)) == 1000
    assert stretch.max() < 10**9
    assert peak < 10**6


def test_all_but_some_are_the_others_in_order() -> None:
    left_out = np.array([50, 3, 4, 99, 0])
    others = AllBut(100, left_out)
    expected = np.setdiff1d(np.arange(100), left_out)
    assert len(others) == 95
    np.testing.assert_array_equal(np.asarray(others), expected)
    np.testing.assert_array_equal(others[np.array([94, 1, 1])], expected[[94, 1, 1]])
    assert others[1] == expected[1]
    np.testing.assert_array_equal(np.asarray(AllBut(5, np.arange(0))), np.arange(5))
