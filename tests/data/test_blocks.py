"""The order of examples in blocks, and splits of blocks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Split
from mnist_ray.data.order import StreamOrder, part_of
from mnist_ray.data.sampler import ShardedBatchSampler
from mnist_ray.data.splits import splits_of, subset
from mnist_ray.errors import UsageError
from mnist_ray.workload import Data
from tests.conftest import SIZES, Numbers


def order_of(batch_size: int, num_streams: int, epoch: int = 0, sizes: Sequence[int] = SIZES) -> StreamOrder:
    return StreamOrder(np.array(sizes), batch_size, num_streams, 0, epoch)


@pytest.mark.parametrize("num_streams", [1, 3, 8, 40])
@pytest.mark.parametrize("batch_size", [1, 16, 100, 500])
def test_an_epoch_has_each_example_once_in_an_order_of_its_own(batch_size: int, num_streams: int) -> None:
    first, second = (order_of(batch_size, num_streams, epoch) for epoch in range(2))
    assert sorted(first[:].tolist()) == list(range(sum(SIZES)))
    assert first[:].tolist() not in (second[:].tolist(), list(range(sum(SIZES))))
    for some in (slice(50, 170), slice(7, 8), slice(7, 7), slice(sum(SIZES) - 3, None)):
        assert first[some].tolist() == first[:][some].tolist()


@pytest.mark.parametrize("num_chunks", [None, 8])
@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_any_number_of_workers_takes_the_same_batches_from_their_own_streams(
    world_size: int, num_chunks: int | None
) -> None:
    def slices(world_size: int, first_step: int) -> list[list[int]]:
        """Return each step's examples, those of all ranks in turn."""
        of_steps: list[list[int]] = []
        for rank in range(world_size):
            order, of_rank = order_of(30, 8), list[list[int]]([[]])
            options: Any = {"rank": rank, "world_size": world_size, "first_step": first_step, "num_chunks": num_chunks}
            for request in ShardedBatchSampler(len(order), 30, 0, 0, **options, order=order):
                of_rank[-1] += [] if request.is_filler else request.indices.tolist()
                of_rank += [[]] * request.ends_step
            of_steps = [[*before, *own] for before, own in zip(of_steps or [[]] * len(of_rank), of_rank, strict=True)]
        return of_steps[:-1]

    one = slices(1, 0)
    assert slices(world_size, 0) == one
    assert slices(world_size, 3) == one[3:]


@pytest.mark.parametrize("first_step", [0, 4, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_reads_of_a_rank_are_the_blocks_of_its_steps(world_size: int, first_step: int) -> None:
    order, ends = order_of(30, 8), np.cumsum(SIZES)
    for rank in range(world_size):
        reads = order.reads(part_of(8, rank, world_size), first_step)
        assert [read.first_step for read in reads] == sorted(read.first_step for read in reads)
        options: Any = {"rank": rank, "world_size": world_size, "first_step": first_step}
        needed = set[tuple[int, int]]()
        sampler = ShardedBatchSampler(len(order), 30, 0, 0, **options, order=order)
        for step, request in enumerate(sampler, first_step):
            blocks = np.searchsorted(ends, request.indices, side="right").tolist()
            needed |= {(step, block) for block in blocks if not request.is_filler}
        announced = {(step, block) for first, last, block in reads for step in range(first, last + 1)}
        assert needed <= announced
        if first_step == 0:
            assert {block for _, block in needed} == {block for _, block in announced}


def test_examples_of_far_blocks_meet_in_a_batch() -> None:
    sizes = [100] * 80  # as if sorted by class
    batch = order_of(64, 8, sizes=sizes)[:64] // 100
    assert len({*batch.tolist()}) > 20


def test_whole_blocks_are_held_out_and_the_rest_is_trained_on() -> None:
    splits = splits_of(Data(Numbers(), Numbers([9])), 60)
    train, validation = splits.train.block_sizes, splits.validation.block_sizes
    assert train is not None
    assert validation is not None
    assert (train + validation).tolist() == SIZES
    assert (train * validation).tolist() == [0] * len(SIZES)
    assert 0 < validation.sum() <= 60
    assert [splits.train[index][0] for index in range(len(splits.train))] == sorted(
        {*range(sum(SIZES))} - {splits.validation[index][0] for index in range(len(splits.validation))}
    )


def test_one_block_cannot_be_divided() -> None:
    with pytest.raises(UsageError, match="all training examples are in one block; set --validation-size 0"):
        splits_of(Data(Numbers([100]), Numbers([9])), 10)
    assert len(splits_of(Data(Numbers([100]), Numbers([9])), 0).train) == 100


def test_a_fraction_has_whole_blocks_and_overfitting_some_of_their_examples() -> None:
    whole = splits_of(Data(Numbers(), Numbers()), 0)
    half = subset(whole, TrainConfig(limit=0.5)).train.block_sizes
    assert half is not None
    assert {*zip(half.tolist(), SIZES, strict=True)} <= {
        *zip(SIZES, SIZES, strict=True),
        *((0, size) for size in SIZES),
    }
    assert 0 < half.sum() <= sum(SIZES) / 2
    few = subset(whole, TrainConfig(overfit_batches=2, batch_size=8)).train
    assert len({few[index][0] for index in range(len(few))}) == 16
    assert few.block_sizes is None
    in_small_blocks = splits_of(Data(Numbers([5] * 20), Numbers()), 0)
    few = subset(in_small_blocks, TrainConfig(overfit_batches=2, batch_size=8)).train
    assert len({few[index][0] for index in range(len(few))}) == 15, "three whole blocks"


def test_a_small_fraction_of_large_blocks_is_one_block_and_never_one_that_is_held_out() -> None:
    whole = splits_of(Data(Numbers([100] * 4), Numbers()), 200)  # two of four blocks are left
    assert len(subset(whole, TrainConfig(limit=0.19)).train) == 100


def test_the_last_block_is_kept_for_the_next_example_but_not_sent_to_other_processes() -> None:
    blocks = Numbers()
    assert [blocks[index][1] for index in (41, 42, 46, 0)] == [41, 42, 46, 0]
    assert blocks.read_blocks == [1, 0]
    assert "_last" not in blocks.__getstate__()
    assert Split(blocks)[45] == (45, 45)
