"""Loading from blocks: what is read, when, and how much of it is in memory at a time."""

import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import Batches, MicroBatch, batch_loader, order_of
from mnist_ray.data.data import Split
from mnist_ray.data.order import Shuffled
from mnist_ray.data.sampler import Request, ShardedBatchSampler
from mnist_ray.errors import ExampleError
from mnist_ray.workload import Arrays, Blocks, Classification, Regression, Workload
from tests.conftest import SIZES, Numbers, wait_for

CPU = torch.device("cpu")
CONFIG = TrainConfig(batch_size=27, num_epochs=2)  # 9 steps


def dataset_of(blocks: Blocks, read_ahead_mib: int = 64) -> Batches:
    return Batches(Split(blocks), CPU, read_ahead_mib=read_ahead_mib)


def epochs(
    dataset: Batches, rank: int = 0, world_size: int = 1, first_step: int = 0, config: TrainConfig = CONFIG
) -> Iterator[MicroBatch]:
    """Yield a rank's batches of all epochs, as the engine reads them."""
    dataset.read_ahead(config, first_step, rank, world_size)
    for epoch in range(config.num_epochs):
        order = order_of(dataset.split, config, epoch)
        step = 0 if epoch else first_step
        sampler = ShardedBatchSampler(
            len(dataset), config.batch_size, config.seed, epoch, rank, world_size, step, order=order
        )
        yield from batch_loader(dataset, sampler, CPU)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_the_batches_and_each_reads_its_streams_once_an_epoch(world_size: int) -> None:
    whole = [batch.inputs.tolist() for batch in epochs(dataset_of(Numbers()))]
    of_ranks, num_reads = [], 0
    for rank in range(world_size):
        blocks = Numbers()
        of_ranks.append([batch.inputs.tolist() for batch in epochs(dataset_of(blocks), rank, world_size)])
        num_reads += len(blocks.read_blocks)
    assert [[*itertools.chain(*parts)] for parts in zip(*of_ranks, strict=True)] == whole
    num_blocks = np.count_nonzero(SIZES)
    assert num_reads <= 2 * (num_blocks + 7), "a block at one of the seven borders may be read twice"


def test_a_resumed_worker_reads_its_windows_and_no_more() -> None:
    sizes, config = [20] * 200, TrainConfig(batch_size=40, num_epochs=1)
    blocks = Numbers(sizes)
    rest = [batch.inputs.tolist() for batch in epochs(dataset_of(blocks), first_step=90, config=config)]
    assert rest == [batch.inputs.tolist() for batch in epochs(dataset_of(Numbers(sizes)), config=config)][90:]
    assert len(blocks.read_blocks) <= 8 * 4 + 8, "a tenth of the epoch is left, and the windows' other blocks"


class Counted(Blocks):
    """Blocks of half a MiB, which knows how many of them are in memory."""

    def __init__(self, number: int) -> None:
        self.sizes = [16] * number
        self.in_memory = self.most = self.reads = 0

    def read(self, block: int) -> Arrays:
        inputs = np.zeros((16, 2**15), np.uint8)
        self.reads += 1
        self.in_memory += 1
        self.most = max(self.most, self.in_memory)
        weakref.finalize(inputs, self.forget)
        return Arrays(inputs, np.zeros(16, np.int64))

    def forget(self) -> None:
        self.in_memory -= 1


@pytest.mark.parametrize("number", [160, 640])
def test_memory_does_not_grow_with_the_data(number: int) -> None:
    blocks, config = Counted(number), TrainConfig(batch_size=64, num_epochs=1, num_streams=2)
    for _ in epochs(dataset_of(blocks, read_ahead_mib=12), config=config):
        assert blocks.in_memory <= 24
    assert blocks.most > 16, "blocks are read ahead of the windows of two streams"


def test_blocks_of_the_next_epoch_are_read_before_it_begins() -> None:
    blocks, config = Counted(160), TrainConfig(batch_size=64, num_epochs=2, num_streams=2)
    batches = epochs(dataset_of(blocks, read_ahead_mib=12), config=config)
    for _ in range(40):
        next(batches)
    wait_for(lambda: blocks.reads > 162, timeout_s=30)


def test_a_rank_without_examples_in_a_step_keeps_its_blocks() -> None:
    blocks, config = Counted(160), TrainConfig(batch_size=852, num_epochs=2, num_streams=8)  # the last batch has 4
    for _ in epochs(dataset_of(blocks, read_ahead_mib=24), rank=0, world_size=4, config=config):
        pass
    assert blocks.reads <= 2 * (160 / 4 + 2)


def test_data_that_fit_into_the_memory_are_read_once_for_all_epochs() -> None:
    blocks = Numbers()
    assert len(list(epochs(dataset_of(blocks)))) == 18
    assert len(blocks.read_blocks) == np.count_nonzero(SIZES)


def test_more_workers_than_streams_are_refused_also_if_nobody_has_asked_for_so_many() -> None:
    with pytest.raises(ExampleError, match=r"^9 workers are more than the 8 streams of blocks; start a run with more"):
        next(epochs(dataset_of(Numbers()), rank=0, world_size=9))


def test_too_large_blocks_are_refused_with_a_remedy() -> None:
    batches = epochs(dataset_of(Counted(160), read_ahead_mib=8), config=TrainConfig(batch_size=64))
    with pytest.raises(ExampleError) as raised:
        list(batches)
    assert str(raised.value) == (
        "a step needs 32 blocks at a time, 16 MiB in all, more than read_ahead_mib 8; raise it, write smaller blocks "
        "(row groups), or start a run with fewer num_streams"
    )


class Failing(Numbers):
    """Reading fails with the given errors, one after the other."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.errors, self.lock = list(errors), threading.Lock()

    def read(self, block: int) -> Any:
        with self.lock:
            if self.errors:
                raise self.errors.pop()
        return super().read(block)


def test_a_storage_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_ray.storage.time.sleep", Mock())
    failing = Failing(*[ConnectionResetError("by peer")] * 5)
    assert [batch.inputs.tolist() for batch in epochs(dataset_of(failing))] == [
        batch.inputs.tolist() for batch in epochs(dataset_of(Numbers()))
    ]
    assert failing.errors == []


def test_other_errors_name_the_block() -> None:
    with pytest.raises(ExampleError, match=r"^train block \d+ cannot be read: KeyError: 'label'$"):
        list(epochs(dataset_of(Failing(KeyError("label")))))
    short = Numbers()
    short.sizes = [*SIZES[:-1], 6]
    short.read = Mock(side_effect=lambda block: Arrays(np.arange(5), np.arange(5)))  # type: ignore[method-assign]
    with pytest.raises(ExampleError, match=r"^train block \d+ has 5 examples, but sizes has \d+$"):
        list(epochs(dataset_of(short)))


class OfLabels(Blocks):
    """Three blocks of four examples each."""

    sizes = (4, 4, 4)

    def __init__(self, *targets: int, is_decoded: bool = False, width: int = 2) -> None:
        self.targets, self.is_decoded, self.width = np.array(targets), is_decoded, width

    def read(self, block: int) -> Any:
        inputs = np.zeros((4, self.width if block == 1 else 2), np.float32)
        arrays = Arrays(inputs, self.targets[4 * block : 4 * block + 4])
        return [*zip(arrays.inputs, arrays.targets.tolist(), strict=True)] if self.is_decoded else arrays


def read_all(blocks: Blocks, workload: Workload) -> list[int]:
    """Return the targets, as an evaluation reads them."""
    batches = Batches(Split(blocks), CPU, workload.collate, workload.find_fault)
    return [target for start in (0, 4, 8) for target in batches[Request(np.arange(start, start + 4))].targets.tolist()]


REMEDY = "fix the code that reads it, or write it again and start another run"
OF_THREE = Classification(metadata={"class_names": "abc"})


@pytest.mark.parametrize("is_decoded", [False, True])
def test_a_target_that_is_no_class_is_refused_with_its_block_and_row(is_decoded: bool) -> None:
    right, wrong = [0, 1, 2, 0] * 3, [0, 1, 2, 0, 0, 1, 2, 3, -1, 0, 0, 0]
    assert read_all(OfLabels(*right, is_decoded=is_decoded), OF_THREE) == right
    said = f"^block 1 has target 3 in row 3, but the classes are 0 to 2; {REMEDY}$"
    with pytest.raises(ExampleError, match=said):
        read_all(OfLabels(*wrong, is_decoded=is_decoded), OF_THREE)
    assert read_all(OfLabels(*wrong, is_decoded=is_decoded), Regression()) == wrong


def test_targets_that_a_workloads_own_code_interprets_are_not_refused() -> None:
    class Joining(Classification):
        def collate(self, examples: Any) -> Any:
            return torch.zeros(len(examples), 2), torch.tensor([target % 3 for _, target in examples])

    joining = Joining(metadata=OF_THREE.metadata)
    assert read_all(OfLabels(*range(12), is_decoded=True), joining) == [0, 1, 2] * 4


def test_arrays_unlike_those_of_other_blocks_are_refused_with_both_blocks() -> None:
    blocks = OfLabels(*[0] * 12, width=3)
    blocks.block_names = [f"some.parquet, row group {number}" for number in range(3)]
    with pytest.raises(ExampleError) as raised:
        read_all(blocks, OF_THREE)
    parts = [(f"some.parquet, row group {n}", {"inputs": (2 + n,), "targets": ()}) for n in (0, 1)]
    of_both = [  # threads read both at once
        f"{one} has shapes {shapes}, but {other} has {others}; {REMEDY}"
        for (one, shapes), (other, others) in (parts, parts[::-1])
    ]
    assert str(raised.value) in of_both


class Pairs(Numbers):
    """Examples whose inputs are dicts of numbers and texts."""

    def read(self, block: int) -> Sequence[tuple[Any, Any]]:
        return [({"number": int(number), "text": str(number)}, float(number)) for number in super().read(block).inputs]


def test_blocks_may_hold_pairs_of_anything_that_can_be_joined_and_are_read_ahead() -> None:
    blocks, whole = Pairs(), [batch.inputs.tolist() for batch in epochs(dataset_of(Numbers()))]
    pairs = list(epochs(dataset_of(blocks)))
    assert [batch.inputs["number"].tolist() for batch in pairs] == whole
    assert pairs[0].targets.dtype == torch.float64
    assert len(blocks.read_blocks) == np.count_nonzero(SIZES)


def test_examples_that_no_order_announces_are_read_when_needed() -> None:
    blocks = Numbers()
    batch = dataset_of(blocks)[Request(np.array([46, 0, 41]))]
    assert batch.inputs.tolist() == [46, 0, 41]
    assert sorted(blocks.read_blocks) == [0, 1]
    few = Split(blocks, np.tile(np.arange(35, 45), 3))  # as with --overfit-batches
    assert isinstance(order_of(few, CONFIG, 0), Shuffled)


def test_an_evaluation_reads_each_block_once_and_holds_few_whatever_the_memory() -> None:
    blocks = Counted(100)
    dataset = dataset_of(blocks)
    for start in range(0, 1600, 20):
        dataset[Request(np.arange(start, start + 20))]
    assert blocks.reads == 100
    assert blocks.most <= 3, "one whose rows are taken, one that is read, one to be forgotten"
