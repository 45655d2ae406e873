import gc
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mnist_ray.parallel import shared_memory
from tests.ranks import call_on_ranks

WORLD_SIZE, SIZE, NUM_CALLS = 3, 1000, 60


def vector_of(rank: int, call: int) -> torch.Tensor:
    """Return a rank's vector for a call. Its length differs between calls, like that of DDP's buckets."""
    rng = np.random.default_rng((rank, call))
    return torch.from_numpy(rng.standard_normal(1 + 17 * call % SIZE).astype(np.float32))


def exchange_on_each_rank(rank: int, folder: Path) -> None:
    """Exchange vectors, with each rank late at other calls; then let DDP use memory that exists or does not."""
    if rank >= WORLD_SIZE:
        return
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    memory = shared_memory.open_together(SIZE)
    assert memory is not None
    exchanged = shared_memory.Exchange(memory, rank, WORLD_SIZE, SIZE)
    results = []
    for call in range(NUM_CALLS):
        if call % WORLD_SIZE == rank:
            time.sleep(0.003)
        results.append(exchanged(vector_of(rank, call)).numpy().copy())
    np.savez(folder / f"rank-{rank}", *results)

    models = [nn.Linear(3, 2), nn.Linear(3, 2).double()]
    used = [shared_memory.use_if_possible(DistributedDataParallel(model)) for model in models]
    place = folder / "not-here" if rank == 1 else shared_memory._FOLDER  # as on another machine
    with mock.patch.object(shared_memory, "_FOLDER", place):
        used.append(shared_memory.use_if_possible(DistributedDataParallel(nn.Linear(3, 2))))
    (folder / f"used-{rank}").write_text(str(used))
    gc.collect()  # models in reference cycles hold the group, whose threads must end before the process
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def exchanged(ranks: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shared_memory.is_supported():
        pytest.skip("not x86-64 Linux")
    folder = tmp_path_factory.mktemp("exchanged")
    call_on_ranks(ranks, exchange_on_each_rank, folder)
    return folder


def test_every_rank_sees_the_vectors_of_all_at_each_call(exchanged: Path) -> None:
    of_ranks = [np.load(exchanged / f"rank-{rank}.npz") for rank in range(WORLD_SIZE)]
    for call in range(NUM_CALLS):
        expected = torch.stack([vector_of(rank, call) for rank in range(WORLD_SIZE)])
        for of_rank in of_ranks:
            np.testing.assert_array_equal(of_rank[f"arr_{call}"], expected)


def test_all_ranks_use_memory_or_none_does_and_no_file_remains(exchanged: Path) -> None:
    used = [(exchanged / f"used-{rank}").read_text() for rank in range(WORLD_SIZE)]
    assert used == ["[True, False, False]"] * WORLD_SIZE, "float32, float64, memory that a rank cannot open"
    assert not list(Path("/dev/shm").glob("mnist_ray-*"))
