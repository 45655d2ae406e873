import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock as Mock

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from mnist_ray.cluster.remote_data import share
from mnist_ray.data.batches import Batches, MicroBatch, batch_loader, to_device
from mnist_ray.data.data import Data, Split
from mnist_ray.data.readers import ArrayReader
from mnist_ray.data.sampler import Request, ShardedBatchSampler
from mnist_ray.errors import ExampleError, TrainingStoppedError, with_place
from mnist_ray.workload import Arrays, Blocks
from tests.conftest import mnist

CPU = torch.device("cpu")
ARRAYS = Split(Arrays(np.arange(10), np.arange(10)))
NUM_EXAMPLES, BATCH_SIZE = 10, 4  # the last batch has two examples


class Rows(Dataset):
    """Example i is a row of three times i, with i as its target."""

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return np.full(3, index, np.float32), index


class Noisy(Rows):
    """Draws from each generator that augmentation may draw from."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return torch.tensor([random.random(), np.random.random(), torch.rand(()).item()]), index


class Tables(Rows):
    """Inputs are a dict, of which one entry holds two tensors."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return {"size": index, "image": (np.full((2, 2), index, np.uint8), torch.tensor(index / 2))}, float(index)


def slices_of(
    dataset: Batches, rank: int, world_size: int, num_processes: int = 0, first_step: int = 0
) -> list[MicroBatch]:
    """Return one rank's batches of an epoch."""
    sampler = ShardedBatchSampler(
        len(dataset), BATCH_SIZE, seed=3, pass_number=0, rank=rank, world_size=world_size, first_step=first_step
    )
    return list(batch_loader(dataset, sampler, CPU, num_processes))


def leaves(value: Any) -> list[Any]:
    """Return the tensors of a batch's inputs or targets, in their order."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]


# --- batches


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["dataset", "arrays"])
def test_read_only_arrays_are_loaded_without_a_warning(kind: str) -> None:
    rows = np.arange(4)[:, None]
    rows.setflags(write=False)
    examples = [(row, 0) for row in rows] if kind == "dataset" else Arrays(rows, rows)
    torch.set_warn_always(True)  # torch warns only once, maybe in an earlier test
    try:
        assert Batches(Split(examples), CPU)[Request(np.array([2, 1]))].inputs.tolist() == [[2], [1]]
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize("kind", ["dataset", "arrays"])
def test_every_example_is_loaded_once_an_epoch_in_the_samplers_order(kind: str) -> None:
    rows = np.arange(NUM_EXAMPLES, dtype=np.float32)[:, None].repeat(3, 1)
    rows.setflags(write=False)
    examples = Split(Rows()) if kind == "dataset" else Split(Arrays(rows, np.arange(NUM_EXAMPLES)))
    batches = slices_of(Batches(examples, CPU), 0, 1)
    sampled = list(ShardedBatchSampler(NUM_EXAMPLES, BATCH_SIZE, seed=3, pass_number=0))
    assert [batch.targets.tolist() for batch in batches] == [indices.tolist() for indices, *_ in sampled]
    order = torch.cat([batch.targets for batch in batches])
    assert torch.cat([batch.inputs for batch in batches]).equal(order.float()[:, None].expand(-1, 3))
    assert [batch.global_size for batch in batches] == [4, 4, 2]


@pytest.mark.parametrize("examples", [Tables(), Arrays(np.arange(10), np.arange(10))], ids=["dataset", "arrays"])
def test_a_rank_without_examples_gets_one_that_does_not_count(examples: Any) -> None:
    last = [slices_of(Batches(Split(examples), CPU), rank, 7)[-1] for rank in range(7)]
    assert sorted(batch.is_filler for batch in last) == [False] * 2 + [True] * 5
    assert {(len(batch.targets), batch.global_size) for batch in last} == {(1, 2)}


def test_dicts_keep_their_keys() -> None:
    batch = Batches(Split(Tables()), CPU)[Request(np.array([4, 2]))]
    assert list(batch.inputs) == ["size", "image"]
    assert batch.inputs["size"].tolist() == [4, 2]
    image, half = batch.inputs["image"]
    assert image.tolist() == [[[number] * 2] * 2 for number in (4, 2)]
    assert half.tolist() == [2, 1]


def sequences(examples: Sequence[tuple[Any, Any]]) -> tuple[dict[str, Tensor], Tensor]:
    """Pad sequences of different lengths, and keep the lengths."""
    inputs, targets = zip(*examples, strict=True)
    lengths = torch.tensor([len(each) for each in inputs])
    return {"padded": pad_sequence([*map(torch.tensor, inputs)], True), "lengths": lengths}, torch.tensor(targets)


@pytest.mark.parametrize("num_processes", [0, 1])
def test_the_workloads_collate_joins_the_examples_of_a_data_set(num_processes: int) -> None:
    examples = Split([([1.0] * length, length) for length in (1, 3, 2)])
    (batch,) = batch_loader(Batches(examples, CPU, sequences), [Request(np.array([0, 2]))], CPU, num_processes)
    assert batch.inputs["padded"].tolist() == [[1, 0], [1, 1]]
    assert batch.inputs["lengths"].tolist() == batch.targets.tolist() == [1, 2]
    wrong: tuple[Any, Any] = (lambda examples: (1, 2, 3), lambda examples: 1 / 0)
    with pytest.raises(ExampleError, match=r"^collate must return a pair \(inputs, targets\)$"):
        Batches(examples, CPU, wrong[0])[Request(np.arange(2))]
    with pytest.raises(ZeroDivisionError):
        Batches(examples, CPU, wrong[1])[Request(np.arange(2))]


def test_all_tensors_of_a_batch_are_copied_to_a_device() -> None:
    batch = Batches(Split(Tables()), CPU)[Request(np.array([4, 2]), 2)]
    moved = to_device(batch, torch.device("meta"))
    assert {leaf.device.type for leaf in [*leaves(moved.inputs), *leaves(moved.targets)]} == {"meta"}
    assert list(moved.inputs) == ["size", "image"]
    assert moved.global_size == 2


@pytest.mark.parametrize("examples", [Rows(), Arrays(np.arange(10), np.arange(10))], ids=["dataset", "arrays"])
def test_a_subset_is_loaded_by_its_own_indices(examples: Any) -> None:
    batches = Batches(Split(examples).take(np.array([9, 5, 7])), CPU)
    assert batches[Request(np.array([2, 0]))].targets.tolist() == [7, 9]


# --- random draws


def test_random_draws_are_the_same_in_any_part() -> None:
    whole, part = Split(Noisy()), Split(Noisy()).take(slice(4, 8))
    expected = Batches(whole, CPU)[Request(np.arange(4, 8))]
    assert Batches(part, CPU)[Request(np.arange(4))].inputs.equal(expected.inputs)


# --- arrays


def test_mapped_arrays_give_the_same_batches_as_arrays_in_memory(tmp_path: Path) -> None:
    inputs = np.arange(60, dtype=np.uint8).reshape(NUM_EXAMPLES, 2, 3)
    targets = np.arange(NUM_EXAMPLES, dtype=np.uint16)
    np.save(tmp_path / "inputs.npy", inputs)
    mapped = Split(Arrays(np.load(tmp_path / "inputs.npy", mmap_mode="r"), targets))
    in_memory, in_files = Batches(Split(Arrays(inputs, targets)), CPU), Batches(mapped, CPU)
    for rank in range(3):
        for batch, expected in zip(slices_of(in_files, rank, 3), slices_of(in_memory, rank, 3), strict=True):
            assert batch.inputs.equal(expected.inputs)
            assert batch.targets.equal(expected.targets)
            assert batch.targets.dtype is expected.targets.dtype
            assert batch.global_size == expected.global_size


class Failing(Rows):
    """Cannot be read."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        raise self.error  # here


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StopIteration(), "StopIteration"),
        (EOFError(), "EOFError"),
        (OSError("file is truncated"), "file is truncated$"),
    ],
)
def test_whatever_an_example_raises_names_its_index_in_the_data_set_and_ends_no_loader(
    error: Exception, reason: str
) -> None:
    batches = Batches(Split(Failing(error)).take(np.array([3, 8])), CPU)
    with pytest.raises(ExampleError, match=f"^train example 8 cannot be read: {reason}"):
        list(batch_loader(batches, [Request(np.array([1]), 1), Request(np.array([0]), 1)], CPU))


def test_a_collate_that_raises_stop_iteration_does_not_end_the_data() -> None:
    batches = Batches(Split(Rows()), CPU, Mock(side_effect=StopIteration))
    with pytest.raises(ExampleError, match=r"^collate has raised StopIteration$"):
        list(batch_loader(batches, [Request(np.array([2]), 1)], CPU))


@pytest.mark.parametrize("error", [MemoryError(), ConnectionResetError(), TimeoutError("read timed out")])
def test_errors_that_may_pass_are_raised_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)):
        list(batch_loader(Batches(Split(Failing(error)), CPU), [Request(np.array([2]), 1)], CPU))


def test_a_process_that_loads_another_number_of_examples_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    workload, more = mnist(), range(NUM_EXAMPLES + 1)
    validation = {"few": Rows(), "more": more}
    monkeypatch.setattr(workload, "load_data", lambda: Data(more, validation=validation))  # type: ignore[arg-type]
    few, changed = (Split(Rows(), origin="validation", name=name) for name in validation)
    assert len(share(workload, few).open()) == NUM_EXAMPLES
    with pytest.raises(TrainingStoppedError, match=r"^load_data has 11 validation examples here, 10 in the job"):
        share(workload, changed).open()
    with pytest.raises(TrainingStoppedError, match=r"^load_data has 11 train examples here, 10 in the job; it must"):
        share(workload, Split(Rows())).open()


WIDTH = 10**6  # of windows over ten million numbers: a copy of all windows would have ten terabytes


@pytest.fixture(params=["mapped", "in memory"])
def windows(request: pytest.FixtureRequest, tmp_path: Path) -> np.ndarray:
    if request.param == "mapped":  # the file takes no space where it is empty
        numbers: np.ndarray = np.memmap(tmp_path / "numbers", np.uint8, "w+", shape=10 * WIDTH)
    else:
        numbers = np.zeros(10 * WIDTH, np.uint8)
    numbers[::WIDTH] = range(10)
    return sliding_window_view(numbers, WIDTH)


def test_overlapping_windows_are_never_copied_as_a_whole(windows: np.ndarray) -> None:
    split = Split(Arrays(windows, windows)).take(np.arange(len(windows) - 1))
    assert share(mnist(), split).stored is None  # each process opens them
    batch = Batches(split, CPU)[Request(np.array([WIDTH, 3 * WIDTH - 1]), 2)]
    assert batch.inputs.shape == batch.targets.shape == (2, WIDTH)
    assert batch.inputs.nonzero().tolist() == [[0, 0], [1, 1]]
    assert batch.inputs[:, :2].tolist() == [[1, 0], [0, 3]]


@pytest.mark.parametrize("rows", [slice(None, None, 2), slice(None, None, -1)])
def test_some_rows_of_a_mapped_array_are_read_as_they_are(rows: slice, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.arange(60, dtype=np.uint16).reshape(20, 3))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")[rows]
    batch = Batches(Split(Arrays(mapped, mapped)), CPU)[Request(np.array([7, 2]), 2)]
    assert batch.inputs.tolist() == mapped[[7, 2]].tolist()
    assert batch.inputs.data_ptr() % 64 == 0  # always the same alignment


class ArraysInBlocks(Blocks):
    sizes = (4, 6)

    def read(self, block: int) -> Arrays:
        rows = slice(0, 4) if block == 0 else slice(4, 10)
        inputs, targets = PARTS[rows]
        return Arrays(inputs, targets)


PARTS = Arrays(
    {"words": np.arange(30).reshape(10, 3), "mask": np.arange(10) % 2 == 0},
    {"class": np.arange(10), "box": np.arange(40.0).reshape(10, 4)},
)


@pytest.mark.parametrize("examples", [PARTS, ArraysInBlocks()])
@pytest.mark.parametrize("indices", [None, np.arange(1, 10)])
def test_arrays_may_be_dicts(examples: Arrays | Blocks, indices: np.ndarray | None) -> None:
    split = Split(examples) if indices is None else Split(examples).take(indices)
    chosen = np.array([6, 0, 5])
    batch = Batches(split, CPU)[Request(chosen, 3)]
    inputs, targets = PARTS[chosen if indices is None else indices[chosen]]
    for found, expected in ((batch.inputs, inputs), (batch.targets, targets)):
        assert {name: values.tolist() for name, values in found.items()} == {
            name: values.tolist() for name, values in expected.items()
        }
    assert split[2][1]["class"] == (2 if indices is None else 3)


def test_arrays_stay_in_main_memory_if_the_gpu_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = Arrays(np.zeros((100, 28, 28), np.uint8), np.zeros(100, np.uint8))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (100 * 785 * 2, 10**9))
    assert ArrayReader(Split(arrays), torch.device("cuda")).device == CPU
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 100 * 785)  # PyTorch would give it again
    if torch.cuda.is_available():
        assert ArrayReader(Split(arrays), torch.device("cuda")).device.type == "cuda"
    else:
        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):  # without a GPU, the copy fails
            ArrayReader(Split(arrays), torch.device("cuda"))


def test_only_batches_for_a_gpu_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    examples: Any = batch_loader(Batches(Split(Rows()), CPU), [], CPU)
    arrays: Any = batch_loader(Batches(ARRAYS, CPU), [], torch.device("cuda"))
    assert not examples.pin_memory  # it would take memory of the first GPU
    assert arrays.pin_memory


def test_arrays_are_never_read_by_loader_processes() -> None:
    here: Any = batch_loader(Batches(ARRAYS, CPU), [Request(np.array([2, 5]))], CPU, 2)
    assert [batch.inputs.tolist() for batch in here] == [[2, 5]]
    for_gpu: Any = batch_loader(Batches(ARRAYS, CPU), [], torch.device("cuda"), 2)
    examples: Any = batch_loader(Batches(Split(Rows()), CPU), [], CPU, 2)
    assert (for_gpu.num_workers, examples.num_workers) == (0, 2)


class Sessions(Rows):
    """Each example is the session of the process that reads it."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return os.getsid(0), os.getpid()


def test_a_signal_to_all_processes_of_a_job_does_not_reach_its_loader_processes() -> None:
    (batch,) = batch_loader(Batches(Split(Sessions()), CPU), [Request(np.arange(2))], CPU, 1)
    assert batch.inputs.tolist() == batch.targets.tolist()
    assert batch.inputs[0] != os.getsid(0)


@pytest.mark.parametrize("num_processes", [0, 1])
@pytest.mark.parametrize(
    ("error", "reason"), [(KeyError("no such file"), "KeyError: 'no such file'"), (SystemExit(3), "sys.exit(3)")]
)
def test_an_error_of_a_data_set_has_its_place_in_any_process(
    num_processes: int, error: BaseException, reason: str
) -> None:
    loader = batch_loader(Batches(Split(Failing(error)), CPU), [Request(np.arange(2))], CPU, num_processes)
    with pytest.raises(ExampleError) as raised:
        next(iter(loader))
    line = next(number for number, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "# here" in text)
    said = with_place(raised.value, Path(__file__).parent)
    assert said == f"train example 0 cannot be read: {reason} (test_dataset_loading.py, line {line})"


@pytest.mark.parametrize(
    ("form", "more"), [(lambda array: array, ""), (lambda array: (np.zeros((2, 2)), array), r"\(2, 2\), ")]
)
def test_an_example_that_does_not_fit_the_others_is_named(form: Callable[[Any], Any], more: str) -> None:
    message = (
        rf"^train examples do not fit together: example 2 has shapes \({more}\(4,\), \(\)\), "
        rf"example 1 has \({more}\(3,\), \(\)\); "
        r"make them alike in the Dataset, or join them in the workload's collate\(\)$"
    )
    examples = [(form(np.zeros(size)), 0) for size in (3, 3, 4)]
    with pytest.raises(ExampleError, match=message):
        Batches(Split(examples), CPU)[Request(np.arange(1, 3))]
