"""Examples that training draws by weight."""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import Batches, batch_loader, order_of
from mnist_ray.data.data import Split, Splits
from mnist_ray.data.digests import digests_of
from mnist_ray.data.order import Drawn
from mnist_ray.data.sampler import ShardedBatchSampler
from mnist_ray.data.splits import splits_of, subset
from mnist_ray.errors import UsageError
from mnist_ray.workload import Arrays, Blocks, Data, Regression
from mnist_ray.workload.calls import data_of

CONFIG = TrainConfig(batch_size=20, num_epochs=3)
CPU = torch.device("cpu")


def arrays(start: int, number: int) -> Arrays:
    values = np.arange(start, start + number, dtype=np.float32)
    return Arrays(values[:, None], values)


class Examples(Dataset):
    def __init__(self, start: int, number: int) -> None:
        self.start, self.number = start, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[np.ndarray, float]:
        return np.full(1, self.start + index, np.float32), float(self.start + index)


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


def seen(split: Split, rank: int = 0, world_size: int = 1, first_step: int = 0) -> Iterator[list[float]]:
    """Yield the targets of a rank's slices of the steps of all passes, as the engine reads them."""
    batches = Batches(split, CPU)
    first_pass, first = divmod(first_step, CONFIG.steps_per_pass(len(split)))
    for number in range(first_pass, CONFIG.num_epochs):
        order = order_of(split, CONFIG, number)
        settings = CONFIG.batch_size, CONFIG.seed, number, rank, world_size, first
        sampler = ShardedBatchSampler(len(split), *settings, order=order)
        yield from (
            batch.targets.tolist() if not batch.is_filler else [] for batch in batch_loader(batches, sampler, CPU)
        )
        first = 0


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


@pytest.mark.parametrize("examples", [WEIGHTED.train, Examples(0, 100)], ids=["arrays", "dataset"])
def test_batches_do_not_depend_on_the_ranks_and_a_resumed_run_has_the_same(examples: Any) -> None:
    split = loaded(Data(examples, arrays(0, 9), weights=WEIGHTED.weights)).train
    whole = [*seen(split)]
    for world_size in (2, 3):
        ranks = [[*seen(split, rank, world_size)] for rank in range(world_size)]
        assert [[*itertools.chain(*parts)] for parts in zip(*ranks, strict=True)] == whole
    for first_step, world_size in zip((1, 5, 13), (3, 1, 2), strict=True):
        ranks = [[*seen(split, rank, world_size, first_step)] for rank in range(world_size)]
        assert [[*itertools.chain(*parts)] for parts in zip(*ranks, strict=True)] == whole[first_step:]


class Noisy(Examples):
    def __getitem__(self, index: int) -> tuple[np.ndarray, float]:
        return super().__getitem__(index)[0], float(torch.rand(()))


def test_an_example_that_is_drawn_again_has_other_random_numbers() -> None:
    rare = np.where(np.arange(100) < 3, 20.0, 1.0)
    split = loaded(Data(Noisy(0, 100), arrays(0, 9), weights=rare)).train
    whole = [*itertools.chain(*seen(split))]
    assert len({*whole[: len(split)]}) == len(split), "in a pass"
    ranks = [[*seen(split, rank, 3, first_step=2)] for rank in range(3)]
    assert [*itertools.chain(*(itertools.chain(*parts) for parts in zip(*ranks, strict=True)))] == whole[40:]


def test_the_weights_are_those_of_the_examples_that_are_left_to_train_on() -> None:
    for splits in (loaded(WEIGHTED), subset(loaded(WEIGHTED), TrainConfig(limit=0.3, batch_size=2))):
        split = splits.train
        assert split.weights is not None
        assert split.weights.tolist() == [split[index][1] for index in range(len(split))]
        assert splits.validation.draws is not None, "it is held out from the same examples"


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
