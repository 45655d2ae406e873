from __future__ import annotations

import numpy as np
import pytest

from mnist_ray.config import TrainConfig
from mnist_ray.workload.data import Arrays, Split, Splits, subset, verdict


def parts(num_train: int = 1000) -> Splits:
    """Return parts whose examples are numbers, each of its own."""

    def part(first: int, number: int) -> Split:
        numbers = np.arange(first, first + number)
        return Split(Arrays(numbers, numbers))

    return Splits("numbers", part(0, num_train), part(5000, 100), part(6000, 201))


def test_without_either_flag_the_data_stay_as_they_are() -> None:
    whole = parts()
    assert subset(whole, TrainConfig()) is whole


def test_a_limit_leaves_the_same_part_of_each_part_for_any_seed() -> None:
    some = subset(parts(), TrainConfig(limit=0.1))
    assert [len(part) for part in (some.train, some.validation, some.test)] == [100, 10, 20]
    assert some.name == "0.1 of numbers"
    again = subset(parts(), TrainConfig(limit=0.1, seed=3))
    np.testing.assert_array_equal(some.train.targets(), again.train.targets())
    assert len(np.unique(some.train.targets())) == 100
    assert some.train.targets().max() > 900, "from all over the data, not their beginning"


def test_a_limit_leaves_one_example_at_the_least_and_nothing_of_nothing() -> None:
    whole = parts(3)
    some = subset(Splits("few", whole.train, whole.train.between(0, 0), whole.test), TrainConfig(limit=0.001))
    assert [len(part) for part in (some.train, some.validation, some.test)] == [1, 0, 1]


def test_batches_to_overfit_are_repeated_and_tested_on_and_nothing_is_held_out() -> None:
    few = subset(parts(), TrainConfig(batch_size=16, overfit_batches=2))
    values, counts = np.unique(few.train.targets(), return_counts=True)
    assert len(values) == 32
    assert set(counts) == {31}  # 1,000 // 32 times
    np.testing.assert_array_equal(np.sort(few.test.targets()), values)
    assert len(few.validation) == 0
    assert few.name == "2 batches of numbers, 31 times"


def test_more_batches_to_overfit_than_there_are_are_all() -> None:
    few = subset(parts(50), TrainConfig(batch_size=16, overfit_batches=100))
    assert sorted(few.train.targets()) == list(range(50))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [(2.3, 0.001, "the model can learn these examples"), (2.3, 2.2, "the model has not learned even these examples")],
)
def test_the_verdict_is_by_the_loss_on_the_same_examples(before: float, after: float, said: str) -> None:
    assert verdict(before, after).startswith(f"the loss went from {before:g} to {after:g}: {said}")
