import gc
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from mnist_ray.training import shared_memory

WORLD_SIZE, SIZE, NUM_CALLS = 3, 1000, 60


def vector_of(rank: int, call: int) -> torch.Tensor:
    """The vector that a rank brings to a call; its length changes from call to call, as buckets' do."""
    rng = np.random.default_rng((rank, call))
    return torch.from_numpy(rng.standard_normal(1 + 17 * call % SIZE).astype(np.float32))


def sum_on_each_rank(rank: int, folder: Path) -> None:
    """Sum through memory, each rank late at other calls; then let DDP ask for memory that there is, and is not."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    memory = shared_memory._open_together(SIZE)
    assert memory is not None
    summed = shared_memory.SummedInMemory(memory, rank, WORLD_SIZE, SIZE)
    results = []
    for call in range(NUM_CALLS):
        if call % WORLD_SIZE == rank:
            time.sleep(0.003)
        vector = vector_of(rank, call)
        summed(vector)
        results.append(vector.numpy())
    np.savez(folder / f"rank-{rank}", *results)

    models = [nn.Linear(3, 2), nn.Linear(3, 2).double()]
    used = [shared_memory.use_where_possible(DistributedDataParallel(model)) for model in models]
    if rank == 1:
        shared_memory._FOLDER = folder / "not-here"  # as on another machine
    used.append(shared_memory.use_where_possible(DistributedDataParallel(nn.Linear(3, 2))))
    (folder / f"used-{rank}").write_text(str(used))
    gc.collect()  # models, in cycles of their own, hold the group, whose threads must end before the process does
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def summed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shared_memory.is_supported():
        pytest.skip("not x86-64 Linux")
    folder = tmp_path_factory.mktemp("summed")
    spawn(sum_on_each_rank, (folder,), nprocs=WORLD_SIZE)  # type: ignore[no-untyped-call]
    return folder


def test_every_rank_gets_the_sum_of_each_call_to_the_bit(summed: Path) -> None:
    of_ranks = [np.load(summed / f"rank-{rank}.npz") for rank in range(WORLD_SIZE)]
    for call in range(NUM_CALLS):
        expected = sum((vector_of(rank, call).double() for rank in range(WORLD_SIZE)), torch.zeros(()))
        first, *others = [of_rank[f"arr_{call}"] for of_rank in of_ranks]
        np.testing.assert_allclose(first, expected, atol=1e-6)
        for other in others:
            np.testing.assert_array_equal(other, first)


def test_all_ranks_use_memory_or_none_does_and_only_for_float32(summed: Path) -> None:
    assert [(summed / f"used-{rank}").read_text() for rank in range(WORLD_SIZE)] == [
        "[True, False, False]"
    ] * WORLD_SIZE


def test_no_file_stays_behind(summed: Path) -> None:
    assert not list(Path("/dev/shm").glob("mnist_ray-*"))
