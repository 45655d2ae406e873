"""Trainings in a test: callbacks made of functions; one to three ranks, each a process."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mnist_ray.parallel.group import Group
from mnist_ray.training.callback import Callback

WORLD_SIZES = (1, 2, 3)  # with 3, slices are uneven, and some empty


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
