"""Examples that training draws by weight."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Splits
from mnist_ray.data.digests import digests_of
from mnist_ray.data.order import Drawn
from mnist_ray.data.splits import splits_of, subset
from mnist_ray.errors import UsageError
from mnist_ray.workload import Arrays, Blocks, Data, Regression
from mnist_ray.workload.calls import data_of


def arrays(start: int, number: int) -> Arrays:
    values = np.arange(start, start + number, dtype=np.float32)
    return Arrays(values[:, None], values)


class OfBlocks(Blocks):
    def __init__(self, start: int, sizes: list[int]) -> None:
        self.start, self.sizes = start, sizes

    def read(self, block: int) -> Arrays:
        return arrays(self.start + sum(self.sizes[:block]), self.sizes[block])


def loaded(data: Data) -> Splits:
    class Numbers(Regression):
        def load_data(self) -> Data:
            return data

    return splits_of(data_of(Numbers()), None)


def test_draws_have_the_shares_of_the_weights() -> None:
    weights = np.random.default_rng(0).random(50) * (np.arange(50) % 5 > 0)
    counts = Counter(itertools.chain(*(Drawn(np.tile(weights, 20_000), (0, 1))[:] % 50,)))
    number, expected = 10**6, weights / weights.sum()
    assert all(counts[index] == 0 for index in range(0, 50, 5)), "a weight of 0 is never drawn"
    for index, share in enumerate(expected):
        assert abs(counts[index] - number * share) <= 5 * np.sqrt(number * share * (1 - share))


def test_any_part_of_the_draws_can_be_computed_alone() -> None:
    order = Drawn(np.arange(1000.0), (3, 4))
    assert np.concatenate([order[:17], order[17:400], order[400:]]).tolist() == order[:].tolist()
    assert order[:].tolist() != Drawn(np.arange(1000.0), (3, 5))[:].tolist()


WEIGHTED = Data(arrays(0, 100), arrays(0, 9), weights=np.arange(100.0))


def test_the_weights_are_those_of_the_examples_that_are_left_to_train_on() -> None:
    for splits in (loaded(WEIGHTED), subset(loaded(WEIGHTED), TrainConfig(limit=0.3, batch_size=2))):
        split = splits.train
        assert split.weights is not None
        assert split.weights.tolist() == [split[index][1] for index in range(len(split))]
        assert splits.validation.weights is not None, "it is held out from the same examples"


def test_the_name_of_the_data_says_what_the_metrics_of_the_training_are_over() -> None:
    assert loaded(WEIGHTED).name == "Numbers (drawn by weight)"


def test_other_weights_are_other_data() -> None:
    other = Data(WEIGHTED.train, WEIGHTED.test, weights=np.arange(100.0) + 1)
    found = [digests_of(loaded(data))["weights"] for data in (WEIGHTED, WEIGHTED, other)]
    assert found[0] == found[1] != found[2]
    assert "weights" not in digests_of(loaded(Data(WEIGHTED.train, WEIGHTED.test)))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(99), r"weights must be a NumPy array of numbers, one per example, \(100,\), not float64 \(99,\)"),
        ([1.0] * 100, r"weights must be a NumPy array .* not list"),
        (np.full(100, "x"), r"not <U1 \(100,\)"),
        (np.full(100, -1.0), "weights must be finite numbers from 0, not all of them 0"),
        (np.full(100, np.nan), "weights must be finite numbers from 0"),
        (np.zeros(100), "not all of them 0"),
    ],
)
def test_wrong_weights_are_one_line(weights: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loaded(Data(arrays(0, 100), arrays(0, 9), weights=weights))


def test_weights_are_not_for_blocks() -> None:
    with pytest.raises(UsageError, match="weights are not for Blocks"):
        loaded(Data(OfBlocks(0, [5] * 20), arrays(0, 9), weights=np.ones(100)))
