"""Trainings on one to four ranks, each a process: through shared memory, as on one machine, then through gloo alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from mnist_ray.training import shared_memory
from mnist_ray.training.state import Group
from mnist_ray.workload.data import Arrays

WORLD_SIZES = (1, 2, 3, 4)
WAYS = ("memory", "gloo")
Training = Callable[[Group, Arrays, Path], None]


def train_both_ways(training: Training, split: Arrays, folder: Path) -> Path:
    """Call ``training`` on each rank of each world size, with a folder for each way; return what holds these."""
    for way in WAYS:
        (folder / way).mkdir()
    arguments = (training, split.inputs, split.targets, folder)
    spawn(_train_as_rank, arguments, nprocs=max(WORLD_SIZES))  # type: ignore[no-untyped-call]
    return folder


def _train_as_rank(rank: int, training: Training, inputs: np.ndarray, targets: np.ndarray, folder: Path) -> None:
    torch.set_num_threads(1)
    for way in WAYS:
        if way == "gloo":
            shared_memory.open_together = lambda num_rows, size: None
        for world_size in WORLD_SIZES:
            if rank < world_size:
                store = f"file://{folder}/{way}/store-{world_size}"
                dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
                training(Group(rank, world_size), Arrays(inputs, targets), folder / way)
                dist.destroy_process_group()
