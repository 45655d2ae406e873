import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import Dataset

from mnist_ray.cluster.remote_data import share
from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Split, Splits
from mnist_ray.data.digests import digest_of_files, digests_of
from mnist_ray.data.splits import splits_of, subset
from mnist_ray.errors import UsageError
from mnist_ray.workload import Arrays, Data, Workload


class Squares(Dataset):
    """Example i is (i, i²), from ``first`` on; it counts how often it was read."""

    def __init__(self, number: int, first: int = 0) -> None:
        self.number = number
        self.first = first
        self.num_read = 0

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[int, int]:
        self.num_read += 1
        return self.first + index, (self.first + index) ** 2


def arrays(number: int, first: int = 0) -> Arrays:
    """Return the same examples as arrays."""
    inputs = np.arange(first, first + number)
    return Arrays(inputs, inputs**2)


def mapped(folder: Path, number: int, first: int = 0) -> Arrays:
    """Return the same examples as arrays in files."""
    of_memory, files = arrays(number, first), [folder / f"{first}-{name}.npy" for name in ("inputs", "targets")]
    for file, array in zip(files, (of_memory.inputs, of_memory.targets), strict=True):
        np.save(file, array)
    return Arrays(*(np.load(file, mmap_mode="r") for file in files))


@pytest.fixture(params=["arrays", "mapped", "dataset"])
def ten(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """The examples 0 to 9, as arrays in memory, in files, and as a Dataset."""
    kinds = {"arrays": arrays(10), "mapped": mapped(tmp_path, 10), "dataset": Squares(10)}
    return kinds[request.param]


def inputs_of(split: Split) -> list[int]:
    """Return the inputs of a split's examples; check the targets."""
    examples = [split[index] for index in range(len(split))]
    assert all(target == number**2 for number, target in examples)
    return [int(number) for number, _ in examples]


# --- splits


def test_some_examples_of_a_split_are_a_split(ten: Any) -> None:
    whole = Split(ten)
    assert (len(whole), inputs_of(whole)) == (10, list(range(10)))
    some = whole.take(np.array([7, 2, 5]))
    assert inputs_of(some) == [7, 2, 5]
    assert inputs_of(some.take(np.array([2, 0]))) == [5, 7]


@pytest.mark.parametrize(
    ("start", "stop", "expected", "of_some"),
    [(1, 3, [1, 2], [2, 5]), (2, 12, range(2, 10), [5]), (0, 0, [], []), (0, 10, range(10), [7, 2, 5])],
)
def test_examples_between_two_places_are_a_split(
    ten: Any, start: int, stop: int, expected: list[int], of_some: list[int]
) -> None:
    assert inputs_of(Split(ten).take(slice(start, stop))) == list(expected)
    assert inputs_of(Split(ten).take(np.array([7, 2, 5])).take(slice(start, stop))) == of_some


def test_arrays_in_memory_are_shared_and_copied_by_take_and_all_else_stays_where_it_is(tmp_path: Path) -> None:
    in_memory, in_files = arrays(10), mapped(tmp_path, 10)
    half_mapped = Arrays(in_files.inputs, in_memory.targets)
    splits = [Split(some) for some in (in_memory, in_files, half_mapped, Squares(10))]
    assert [split.is_in_memory for split in splits] == [True, False, False, False]
    assert [split.whole_arrays is not None for split in splits] == [True, False, False, False]
    part = splits[1].take(np.array([3, 1]))
    assert not part.is_in_memory
    assert isinstance(part.examples.inputs, np.memmap)
    assert not np.shares_memory(splits[0].take(np.array([0, 1])).examples.inputs, in_memory.inputs)
    assert np.shares_memory(splits[0].take(slice(0, 2)).examples.inputs, in_memory.inputs)


@pytest.mark.parametrize(
    ("item", "got"), [(torch.ones(2, 3), "Tensor"), ({"x": 1, "y": 2}, "dict"), ((1, 2, 3), "3 values")]
)
def test_items_of_a_dataset_that_are_no_pairs_are_refused(item: object, got: str) -> None:
    with pytest.raises(UsageError, match=rf"^test: a Dataset's items must be pairs \(input, target\), not {got}; "):
        Split([item], origin="test")[0]


def test_a_data_set_is_not_read_to_be_split() -> None:
    dataset = Squares(1000)
    splits = splits_of(Data(dataset, dataset), None)
    assert (len(splits.train), len(splits.validation), dataset.num_read) == (900, 100, 0)


# --- hold-out


@pytest.mark.parametrize(("size", "expected"), [(None, 1), (0, 0), (3, 3), (9, 9)])
def test_the_hold_out_has_the_asked_size_and_is_the_same_for_all_kinds_of_data(
    ten: Any, size: int | None, expected: int
) -> None:
    splits = splits_of(Data(ten, Squares(4, 100), name="squares"), size)
    train, validation = inputs_of(splits.train), inputs_of(splits.validation)
    assert (len(train), len(validation), splits.name) == (10 - expected, expected, "squares")
    assert sorted(train + validation) == list(range(10))
    assert (train, validation) == (sorted(train), sorted(validation))
    assert inputs_of(splits.test) == [100, 101, 102, 103]
    assert validation == inputs_of(splits_of(Data(arrays(10), arrays(4)), size).validation)


def test_held_out_examples_are_spread_and_a_larger_hold_out_contains_a_smaller() -> None:
    data = Data(arrays(1000), arrays(4))
    few, more = (np.array(inputs_of(splits_of(data, number).validation)) for number in (100, 200))
    assert np.histogram(few, 4, (0, 1000))[0].min() >= 10
    assert set(few) < set(more)


@pytest.mark.parametrize(("num_train", "expected"), [(9, 0), (10, 1), (442, 44), (49_999, 4999), (10**7, 5000)])
def test_a_tenth_is_held_out_by_default_and_never_more_than_5000(num_train: int, expected: int) -> None:
    assert len(splits_of(Data(Squares(num_train), Squares(4)), None).validation) == expected


@pytest.mark.parametrize(("size", "train", "validation"), [(None, 10, 3), (0, 10, 0), (2, 8, 2)])
def test_the_datas_own_validation_set_is_used_unless_a_size_is_given(
    size: int | None, train: int, validation: int
) -> None:
    splits = splits_of(Data(arrays(10), arrays(4), arrays(3, 50)), size)
    assert (len(splits.train), len(splits.validation)) == (train, validation)
    assert (inputs_of(splits.validation) == [50, 51, 52]) == (size is None)


class Shared(Workload):
    """A workload whose data each process opens for itself; they are its metadata here."""

    def load_data(self) -> Data:
        data: Data = self.metadata["data"]
        return data


@pytest.mark.parametrize(
    ("validation", "size"),
    [(None, None), (None, 3), (Squares(3, 50), None), (Squares(30, 50), 3)],
    ids=["by-default", "held-out", "own", "held-out-instead-of-own"],
)
@pytest.mark.parametrize("kind", ["mapped", "dataset"])
def test_another_process_opens_the_same_splits(
    tmp_path: Path, kind: str, validation: Squares | None, size: int | None
) -> None:
    data = Data(mapped(tmp_path, 20) if kind == "mapped" else Squares(20), Squares(4, 100), validation)
    splits = splits_of(data, size)
    problem = Shared(None, {"data": data})
    for split in (splits.train, splits.validation, splits.test):
        assert inputs_of(share(problem, split).open()) == inputs_of(split)


# --- subsets


def numbers(num_train: int = 1000, num_validation: int = 100) -> Splits:
    """Return splits whose examples are numbers, each of its own."""
    train, validation, test = arrays(num_train), arrays(num_validation, 5000), arrays(201, 6000)
    return Splits("numbers", Split(train), Split(validation), Split(test))


@pytest.mark.parametrize(
    ("whole", "limit", "sizes"),
    [(numbers(), 0.1, [100, 10, 20]), (numbers(3, 0), 0.001, [1, 0, 1])],
    ids=["a tenth", "one at the least, and nothing of nothing"],
)
def test_a_limit_leaves_the_same_part_of_each_split_for_any_seed(whole: Splits, limit: float, sizes: list[int]) -> None:
    some, again = (subset(whole, TrainConfig(limit=limit, seed=seed)) for seed in (0, 3))
    assert [len(split) for split in (some.train, some.validation, some.test)] == sizes
    assert some.name == f"{limit} of numbers"
    assert inputs_of(some.train) == inputs_of(again.train)
    assert len(set(inputs_of(some.train))) == sizes[0]
    assert subset(whole, TrainConfig()) is whole
    assert max(inputs_of(some.train)) > 900 or len(whole.train) == 3, "from all over the data, not their beginning"


def test_batches_to_overfit_are_repeated_and_tested_on_and_nothing_is_held_out() -> None:
    few = subset(numbers(), TrainConfig(batch_size=16, overfit_batches=2))
    values, counts = np.unique(inputs_of(few.train), return_counts=True)
    assert len(values) == 32
    assert set(counts) == {31}  # 1,000 // 32 times
    assert sorted(inputs_of(few.test)) == values.tolist()
    assert len(few.validation) == 0
    assert few.name == "2 batches of numbers, 31 times"
    all_of_them = subset(numbers(50), TrainConfig(batch_size=16, overfit_batches=100))
    assert sorted(inputs_of(all_of_them.train)) == list(range(50))


# --- digests


def digest_of(examples: Any, indices: Any = None) -> str | None:
    """Return the digest of examples to train on."""
    split = Split(examples) if indices is None else Split(examples).take(indices)
    return digests_of(Splits("", split, split, split))["training"]


def test_equal_arrays_have_equal_digests_and_every_number_and_their_order_count() -> None:
    whole = digest_of(arrays(10))
    assert whole == digest_of(arrays(10))
    inputs = np.arange(24.0).reshape(6, 4)
    strided = Arrays(inputs[::2, ::-1], np.arange(6)[::2])
    assert digest_of(strided) == digest_of(Arrays(inputs[::2, ::-1].copy(), np.array([0, 2, 4])))
    for name in ("inputs", "targets"):
        changed = arrays(10)
        getattr(changed, name)[9] += 1
        assert digest_of(changed) != whole
    assert whole not in (digest_of(arrays(10), slice(0)), digest_of(arrays(10), np.arange(10)[::-1]))


def test_windows_have_a_digest_of_the_numbers_that_they_show(tmp_path: Path) -> None:
    def digest(changed: int, width: int = 10**6) -> str | None:
        numbers = np.zeros(10**7, np.uint8)  # a copy of all windows would have ten terabytes
        numbers[changed] = 1
        windows = sliding_window_view(numbers, width)
        return digest_of(Arrays(windows, windows))

    assert digest(5) == digest(5) is not None
    assert len({digest(5), digest(6), digest(10**7 - 1), digest(5, 10**5)}) == 4
    backwards = sliding_window_view(np.arange(9), 4)[::-1, ::-1]
    assert digest_of(Arrays(backwards, backwards)) not in (None, digest_of(Arrays(backwards[::-1], backwards[::-1])))
    np.save(tmp_path / "numbers.npy", np.arange(10))
    of_file = np.load(tmp_path / "numbers.npy", mmap_mode="r")
    windows = sliding_window_view(of_file, 2)
    assert digest_of(Arrays(windows, windows)) == digest_of(Arrays(of_file, of_file))  # by name, size and time


def test_the_digest_of_files_depends_on_names_sizes_and_times(tmp_path: Path) -> None:
    files = [tmp_path / "cats" / "1.jpg", tmp_path / "dogs" / "1.jpg"]

    def written(content: str = "one", time: int = 100) -> list[Path]:
        for file in files:
            file.parent.mkdir(exist_ok=True)
            file.write_text(content)
            os.utime(file, (time, time))
        return files

    digest = digest_of_files(written())
    others = [digest_of_files(written("three")), digest_of_files(written(time=101)), digest_of_files([])]
    others += [digest_of_files(written()[::-1]), digest_of_files(written()[:1])]
    assert len({digest, *others}) == 6
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for folder in ("cats", "dogs"):
        (tmp_path / folder).rename(moved / folder)
    assert digest_of_files(moved / folder / "1.jpg" for folder in ("cats", "dogs")) == digest


def test_the_digest_of_data_depends_on_the_files_that_they_name(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("one")
    folder = Squares(10)
    folder.samples = [(str(tmp_path / "a.bin"), 0)]  # type: ignore[attr-defined]
    assert digest_of(folder) == digest_of_files([tmp_path / "a.bin"])
    assert digest_of(Squares(10)) is None
    assert digest_of(mapped(tmp_path, 10)) not in (None, digest_of(mapped(tmp_path, 11)))
    unnamed = digests_of(splits_of(Data(Squares(10), arrays(10)), 1))
    assert (unnamed["training"], unnamed["test"]) == (None, digest_of(arrays(10)))
    named = digests_of(splits_of(Data(Squares(10), arrays(10), files=[tmp_path / "a.bin"]), 1))
    assert named.keys() == {"test", "files"}
