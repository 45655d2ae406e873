import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Dataset

from mnist_ray.cluster.remote_data import share
from mnist_ray.errors import UsageError
from mnist_ray.workload import Arrays, Data, Workload
from mnist_ray.workload.data import Split, default_validation_size, digest_of_files, hold_out, splits_of


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


def inputs_of(part: Split) -> list[int]:
    """Return the inputs of a part's examples, each of which is looked at as a whole."""
    examples = [part[index] for index in range(len(part))]
    assert all(target == number**2 for number, target in examples)
    return [int(number) for number, _ in examples]


# --- parts


def test_a_part_has_all_examples_in_their_order(ten: Any) -> None:
    part = Split(ten)
    assert len(part) == 10
    assert inputs_of(part) == list(range(10))


def test_some_examples_of_a_part_are_a_part(ten: Any) -> None:
    part = Split(ten).take(np.array([7, 2, 5]))
    assert inputs_of(part) == [7, 2, 5]
    assert inputs_of(part.take(np.array([2, 0]))) == [5, 7]
    assert part.targets().tolist() == [49, 4, 25]


@pytest.mark.parametrize(
    ("start", "stop", "expected"), [(2, 5, [2, 3, 4]), (8, 12, [8, 9]), (0, 0, []), (0, 10, range(10))]
)
def test_examples_between_two_places_are_a_part(ten: Any, start: int, stop: int, expected: list[int]) -> None:
    assert inputs_of(Split(ten).between(start, stop)) == list(expected)


@pytest.mark.parametrize(("start", "stop", "expected"), [(1, 3, [2, 5]), (2, 9, [5]), (0, 0, [])])
def test_examples_between_two_places_of_a_part_are_a_part(ten: Any, start: int, stop: int, expected: list[int]) -> None:
    part = Split(ten).take(np.array([7, 2, 5]))
    assert inputs_of(part.between(start, stop)) == expected


def test_targets_are_those_of_all_examples(ten: Any) -> None:
    targets = Split(ten).targets()
    assert type(targets) is np.ndarray
    assert targets.tolist() == [number**2 for number in range(10)]


def test_only_arrays_in_memory_are_handed_to_other_processes(tmp_path: Path) -> None:
    in_memory, in_files = arrays(10), mapped(tmp_path, 10)
    half_mapped = Arrays(in_files.inputs, in_memory.targets)
    examples = [in_memory, in_files, half_mapped, Squares(10)]
    assert [Split(some).is_in_memory for some in examples] == [True, False, False, False]
    assert [Split(some).arrays is not None for some in examples] == [True, False, False, False]
    assert [some.is_mapped for some in (in_memory, in_files, half_mapped)] == [False, True, True]


def test_examples_taken_of_mapped_arrays_are_not_read_into_memory(tmp_path: Path) -> None:
    part = Split(mapped(tmp_path, 10)).take(np.array([3, 1]))
    assert not part.is_in_memory
    assert part.arrays is None
    assert isinstance(part.examples.inputs, np.memmap)


def test_examples_taken_of_arrays_are_a_copy_and_those_between_two_places_a_view() -> None:
    whole = arrays(10)
    taken, between = Split(whole).take(np.array([0, 1])), Split(whole).between(0, 2)
    assert not np.shares_memory(taken.examples.inputs, whole.inputs)
    assert np.shares_memory(between.examples.inputs, whole.inputs)


def test_a_data_set_is_not_read_to_be_parted() -> None:
    dataset = Squares(1000)
    parts = splits_of(Data(dataset, dataset), None)
    assert (len(parts.train), len(parts.validation), dataset.num_read) == (900, 100, 0)


def test_arrays_are_as_long_as_their_targets() -> None:
    assert len(Arrays(np.zeros((3, 28, 28)), np.zeros((3, 2)))) == 3


# --- what is held out


def test_held_out_examples_and_the_others_are_all_examples(ten: Any) -> None:
    train, validation = map(inputs_of, hold_out(Split(ten), 4))
    assert len(validation) == 4
    assert sorted(train + validation) == list(range(10))
    assert (train, validation) == (sorted(train), sorted(validation))


def test_the_same_examples_are_held_out_of_all_kinds_of_data(ten: Any) -> None:
    assert inputs_of(hold_out(Split(ten), 4)[1]) == inputs_of(hold_out(Split(arrays(10)), 4)[1])


def test_held_out_examples_are_from_all_over_the_data() -> None:
    validation = np.array(inputs_of(hold_out(Split(arrays(1000)), 100)[1]))
    assert np.histogram(validation, 4, (0, 1000))[0].min() >= 10


def test_more_are_held_out_besides_those_that_were() -> None:
    few, more = (set(inputs_of(hold_out(Split(arrays(100)), number)[1])) for number in (10, 20))
    assert few < more


@pytest.mark.parametrize(
    ("num_train", "expected"), [(0, 0), (9, 0), (10, 1), (442, 44), (49_999, 4999), (50_000, 5000), (10**7, 5000)]
)
def test_a_tenth_is_held_out_by_default_and_never_more_than_5000(num_train: int, expected: int) -> None:
    assert default_validation_size(num_train) == expected


@pytest.mark.parametrize(("size", "expected"), [(None, 1), (0, 0), (3, 3), (9, 9)])
def test_as_many_are_held_out_as_asked_for(ten: Any, size: int | None, expected: int) -> None:
    parts = splits_of(Data(ten, Squares(4, 100), name="squares"), size)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (10 - expected, expected, 4)
    assert sorted(inputs_of(parts.train) + inputs_of(parts.validation)) == list(range(10))
    assert inputs_of(parts.test) == [100, 101, 102, 103]
    assert parts.name == "squares"


@pytest.mark.parametrize("size", [1200, 9999])
def test_something_must_be_left_to_train_on(size: int) -> None:
    with pytest.raises(UsageError) as raised:
        splits_of(Data(Squares(1200), Squares(4)), size)
    assert str(raised.value) == (
        f"--validation-size {size:,} leaves nothing to train on: the data has 1,200 training examples"
    )


def test_a_validation_set_of_the_datas_own_is_taken_where_no_size_is_given(ten: Any) -> None:
    parts = splits_of(Data(ten, Squares(4), arrays(3, 50)), None)
    assert inputs_of(parts.train) == list(range(10))
    assert inputs_of(parts.validation) == [50, 51, 52]


def test_nothing_is_held_out_though_the_data_have_a_validation_set() -> None:
    parts = splits_of(Data(arrays(10), arrays(4), arrays(3, 50)), 0)
    assert (len(parts.train), len(parts.validation)) == (10, 0)


def test_a_size_has_training_examples_held_out_though_the_data_have_a_validation_set() -> None:
    parts = splits_of(Data(arrays(10), arrays(4), arrays(3, 50)), 2)
    assert len(parts.validation) == 2
    assert sorted(inputs_of(parts.train) + inputs_of(parts.validation)) == list(range(10))


class Shared(Workload):
    """A workload whose data each process opens for itself; they are its metadata here."""

    def load_data(self) -> Data:
        data: Data = self.metadata["data"]
        return data


@pytest.mark.parametrize(
    ("validation", "size"),
    [
        (None, None),
        (None, 3),
        (Squares(3, 50), None),
        (Squares(30, 50), 3),
    ],
    ids=["by-default", "held-out", "own", "held-out-instead-of-own"],
)
def test_another_process_opens_the_parts_as_they_are_here(validation: Squares | None, size: int | None) -> None:
    data = Data(Squares(20), Squares(4, 100), validation)
    parts = splits_of(data, size)
    problem = Shared(None, {"data": data})
    assert inputs_of(share(problem, parts.train).open()) == inputs_of(parts.train)
    assert inputs_of(share(problem, parts.validation).open()) == inputs_of(parts.validation)
    assert inputs_of(share(problem, parts.test).open()) == inputs_of(parts.test)


def test_held_out_examples_of_mapped_arrays_are_opened_as_they_are_here(tmp_path: Path) -> None:
    data = Data(mapped(tmp_path, 20), arrays(4))
    parts = splits_of(data, 3)
    problem = Shared(None, {"data": data})
    assert inputs_of(share(problem, parts.validation).open()) == inputs_of(parts.validation)


# --- digests


def test_equal_arrays_have_equal_digests() -> None:
    assert Split(arrays(10)).digest() == Split(arrays(10)).digest()
    inputs = np.arange(24.0).reshape(6, 4)
    strided = Split(Arrays(inputs[::2, ::-1], np.arange(6)[::2]))
    assert strided.digest() == Split(Arrays(inputs[::2, ::-1].copy(), np.array([0, 2, 4]))).digest()


def test_every_number_of_arrays_counts_in_their_digest() -> None:
    whole = Split(arrays(10)).digest()
    for name in ("inputs", "targets"):
        changed = arrays(10)
        getattr(changed, name)[9] += 1
        assert Split(changed).digest() != whole
    assert Split(arrays(10)).between(0, 0).digest() != whole


def test_the_order_of_arrays_counts_in_their_digest() -> None:
    assert Split(arrays(3)).take(np.array([0, 2, 1])).digest() != Split(arrays(3)).digest()


def test_no_examples_have_a_digest(ten: Any) -> None:
    assert Split(ten).between(0, 0).digest() == Split(ten).between(0, 0).digest()


def test_files_are_told_from_others_by_names_sizes_and_times(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    (tmp_path / "dogs").mkdir()
    files = [tmp_path / "cats" / "1.jpg", tmp_path / "dogs" / "1.jpg"]

    def written(content: str = "one", time: int = 100) -> list[Path]:
        for file in files:
            file.write_text(content)
            os.utime(file, (time, time))
        return files

    digest = digest_of_files(written())
    assert digest_of_files(written()) == digest
    others = [digest_of_files(written("three")), digest_of_files(written(time=101))]
    others += [digest_of_files(written()[::-1]), digest_of_files(written()[:1])]
    assert len({digest, *others}) == 5
    written()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for folder in ("cats", "dogs"):
        (tmp_path / folder).rename(moved / folder)
    assert digest_of_files(moved / folder / "1.jpg" for folder in ("cats", "dogs")) == digest
    assert digest_of_files([]) != digest


def test_data_are_told_from_others_by_the_files_that_they_name(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("one")
    folder = Squares(10)
    folder.samples = [(str(tmp_path / "a.bin"), 0)]  # type: ignore[attr-defined]
    assert Split(folder).digest() == digest_of_files([tmp_path / "a.bin"])
    assert Split(Squares(10)).digest() is None
    assert Split(mapped(tmp_path, 10)).digest() not in (None, Split(mapped(tmp_path, 11)).digest())
    unnamed = splits_of(Data(Squares(10), arrays(10)), 1)
    assert (unnamed.digests["training"], unnamed.digests["test"]) == (None, Split(arrays(10)).digest())
    named = splits_of(Data(Squares(10), arrays(10), files=[tmp_path / "a.bin"]), 1)
    assert named.digests.keys() == {"test", "files"}
