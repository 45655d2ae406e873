import math

import numpy as np
import pytest

from mnist_ray.data.sampler import ShardedBatchSampler


def shards(num_examples: int, batch_size: int, world_size: int, epoch: int = 0) -> list[list]:
    """Return each rank's slices of an epoch."""
    samplers = (ShardedBatchSampler(num_examples, batch_size, 3, epoch, rank, world_size) for rank in range(world_size))
    return [list(sampler) for sampler in samplers]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("batch_size", [1, 2, 8, 33, 100])
@pytest.mark.parametrize("num_examples", [1, 7, 100, 101])
def test_shards_partition_every_epoch_into_the_same_global_batches(
    num_examples: int, batch_size: int, world_size: int
) -> None:
    alone = shards(num_examples, batch_size, 1)[0]
    for epoch in range(2):
        by_rank = shards(num_examples, batch_size, world_size, epoch)
        assert {len(slices) for slices in by_rank} == {math.ceil(num_examples / batch_size)}
        steps = list(zip(*by_rank, strict=True))
        batches = [
            np.concatenate([micro_batch.indices for micro_batch in step if not micro_batch.is_filler]) for step in steps
        ]
        assert sorted(np.concatenate(batches)) == list(range(num_examples))
        for step, batch in zip(steps, batches, strict=True):
            assert {micro_batch.global_size for micro_batch in step} == {len(batch)}
            lengths = [len(micro_batch.indices) * (not micro_batch.is_filler) for micro_batch in step]
            assert max(lengths) - min(lengths) <= 1
            assert all(len(micro_batch.indices) == 1 for micro_batch in step if micro_batch.is_filler)
        if epoch == 0:
            for batch, (expected, *_) in zip(batches, alone, strict=True):
                np.testing.assert_array_equal(batch, expected)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_no_micro_batch_is_larger_than_its_limit_and_all_ranks_have_as_many(world_size: int) -> None:
    of_ranks = [
        [*ShardedBatchSampler(20, 20, 0, 0, rank, world_size, micro_batch_size=3)] for rank in range(world_size)
    ]
    assert max(len(request.indices) for requests in of_ranks for request in requests) == 3
    assert len({len(requests) for requests in of_ranks}) == 1


def test_each_epoch_and_seed_has_another_order() -> None:
    orders = [
        next(iter(ShardedBatchSampler(500, 500, seed=seed, pass_number=epoch)))[0].tolist()
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]
    ]
    assert len({tuple(order) for order in orders}) == 4
