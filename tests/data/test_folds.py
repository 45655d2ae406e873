"""Folds of examples, of classes and of groups; groups that are held out together."""

import numpy as np
import pytest

from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Arrays, Data
from mnist_ray.data.splits import folds_of_examples, folds_of_groups, random_groups, splits_of
from mnist_ray.errors import UsageError
from mnist_ray.workload import Classification
from mnist_ray.workload.calls import data_of, splits_for
from tests.conftest import Numbers

LABELS = np.repeat(np.arange(3), [50, 31, 7])
GROUPS = np.repeat(np.arange(20), np.arange(1, 21))


class Labelled(Classification):
    """88 examples whose inputs are their places."""

    groups: np.ndarray | None = None

    def load_data(self) -> Data:
        numbers = np.arange(len(LABELS))
        return Data(Arrays(numbers, LABELS), Arrays(numbers[:9], LABELS[:9]), groups=self.groups)


def inputs_of(workload: Labelled, **config: int) -> list[np.ndarray]:
    """Return the inputs of the training, validation and test set of a run."""
    splits = splits_for(workload, data_of(workload), TrainConfig(**config))  # type: ignore[arg-type]
    return [split.examples.inputs for split in (splits.train, splits.validation, splits.test)]


@pytest.mark.parametrize("seed", range(5))
def test_each_fold_has_its_share_of_all_examples_and_of_each_class(seed: int) -> None:
    folds = folds_of_examples(len(LABELS), 4, seed, LABELS)
    for part in (folds, *(folds[label == LABELS] for label in range(3))):
        counts = np.bincount(part, minlength=4)
        assert counts.max() - counts.min() <= 1


def test_the_seed_decides_the_folds() -> None:
    first, again, other = (folds_of_examples(1000, 5, seed, None) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert 0.15 < (first == other).mean() < 0.25


def test_folds_have_whole_groups_and_similar_sizes() -> None:
    for seed in range(5):
        sizes = np.bincount(folds_of_groups(np.bincount(GROUPS), 4, seed)[GROUPS])
        assert sizes.sum() == len(GROUPS)
        assert sizes.max() - sizes.min() <= 3


def test_random_groups_are_as_many_as_fit_and_at_least_one() -> None:
    sizes = np.bincount(GROUPS)
    assert 20 < sizes[random_groups(sizes, 40, 0)].sum() <= 40
    assert sizes[random_groups(sizes, 0, 0)].tolist() == [sizes.min()]


def test_a_group_that_does_not_fit_is_passed_over() -> None:
    sizes = np.ceil(np.random.default_rng(0).lognormal(2, 1.5, 300)).astype(int)
    for seed in range(20):
        assert 490 < sizes[random_groups(sizes, 500, seed)].sum() <= 500


def test_every_example_is_in_the_test_of_one_fold_and_never_in_its_training() -> None:
    parts = [inputs_of(Labelled(None), folds=4, fold=fold) for fold in range(1, 5)]
    assert np.array_equal(np.sort(np.concatenate([test for _, _, test in parts])), np.arange(88))
    for together in map(np.concatenate, parts):
        assert np.array_equal(np.sort(together), np.arange(88))


def test_a_whole_cross_validation_is_tested_on_the_examples_of_all_folds() -> None:
    assert np.array_equal(inputs_of(Labelled(None), folds=4)[2], np.arange(88))
    tests = [inputs_of(Labelled(None), folds=4, fold=fold, limit=0.5)[2] for fold in range(1, 5)]  # type: ignore[arg-type]
    limited = inputs_of(Labelled(None), folds=4, limit=0.5)[2]  # type: ignore[arg-type]
    assert np.array_equal(limited, np.sort(np.concatenate(tests)))


def test_groups_are_never_divided_between_training_validation_and_test() -> None:
    workload = Labelled(None)
    workload.groups = np.array([f"patient {place % 11}" for place in range(88)])
    for config in ({}, {"folds": 3, "fold": 2}):
        train, validation, test = ({*(part % 11).tolist()} for part in inputs_of(workload, **config))
        assert not train & validation
        assert not test & (train | validation) or not config
        assert validation


def test_folds_of_blocks_have_whole_blocks() -> None:
    blocks = Numbers([10] * 6)
    splits = splits_for(Labelled(None), Data(blocks, Arrays(np.zeros(1), np.zeros(1))), TrainConfig(folds=3, fold=1))
    assert len(splits.test) == 20
    assert {index // 10 for index in splits.test.indices.tolist()}.isdisjoint(splits.train.all_indices // 10)  # type: ignore[union-attr]


def test_folds_without_a_fold_leave_the_splits_as_they_are() -> None:
    data = data_of(Labelled(None))
    alone, with_config = splits_of(data, None), splits_for(Labelled(None), data, TrainConfig())
    assert np.array_equal(alone.train.examples.inputs, with_config.train.examples.inputs)


def test_too_many_folds_are_refused() -> None:
    with pytest.raises(UsageError, match="--folds 89 is more than the 88 training examples"):
        folds_of_examples(88, 89, 0, None)
    with pytest.raises(UsageError, match="--folds 21 is more than the 20 groups of training examples"):
        folds_of_groups(np.bincount(GROUPS), 21, 0)


@pytest.mark.parametrize(
    ("groups", "found"), [(np.arange(3), r"int64 \(3,\)"), (np.zeros(88), "float64"), ([0] * 88, "list")]
)
def test_wrong_groups_are_refused(groups: np.ndarray, found: str) -> None:
    workload = Labelled(None)
    workload.groups = groups
    with pytest.raises(UsageError, match=f"groups must be a NumPy array of integers or texts, .* not {found}"):
        data_of(workload)
