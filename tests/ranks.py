"""Trainings in a test: callbacks made of functions; one to three ranks, each a process, in shared memory or gloo."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from mnist_ray.data.data import Arrays
from mnist_ray.parallel import shared_memory
from mnist_ray.parallel.group import Group
from mnist_ray.training.callback import Callback

WORLD_SIZES = (1, 2, 3)  # with 3, slices are uneven, and some empty
WAYS = ("memory", "gloo")
Training = Callable[[Group, Arrays, Path], None]


def call_on_ranks(pool: ProcessPoolExecutor, function: Callable[..., None], *args: Any) -> None:
    """Call ``function(rank, *args)`` in one process per possible rank, at the same time."""
    for future in [pool.submit(_called, function, rank, *args) for rank in range(max(WORLD_SIZES))]:
        future.result()


def _called(function: Callable[..., None], rank: int, *args: Any) -> None:
    torch.set_num_threads(1)
    try:
        function(rank, *args)
    except BaseException:  # also pytest's Failed
        traceback.print_exc()
        os._exit(1)  # the other ranks wait for this one; a broken pool ends them


def train_both_ways(pool: ProcessPoolExecutor, training: Training, split: Arrays, folder: Path) -> Path:
    """Call ``training`` on each rank of each world size, with a folder for each way; return ``folder``."""
    for way in WAYS:
        (folder / way).mkdir()
    call_on_ranks(pool, _train_as_rank, training, split, folder)
    return folder


def _train_as_rank(rank: int, training: Training, split: Arrays, folder: Path) -> None:
    _train(rank, training, split, folder / "memory")
    with mock.patch.object(shared_memory, "open_together", return_value=None):
        _train(rank, training, split, folder / "gloo")


def _train(rank: int, training: Training, split: Arrays, folder: Path) -> None:
    for world_size in WORLD_SIZES:
        if rank < world_size:
            with joined(rank, world_size, folder / f"store-{world_size}") as group:
                training(group, split, folder)


@contextlib.contextmanager
def joined(rank: int, world_size: int, store: Path) -> Iterator[Group]:
    """Let this process be a rank of a group, whose ranks find each other by the file ``store``, a new one each time."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    yield Group(rank, world_size)
    dist.destroy_process_group()


class Hooks(Callback):
    """A callback made of functions: it calls them in place of its methods."""

    def __init__(self, **methods: Callable) -> None:
        vars(self).update(methods)
