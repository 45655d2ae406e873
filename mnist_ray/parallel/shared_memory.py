"""Gradients summed through shared memory, if all ranks are on one machine.

For a small network on few cores, gloo's sum over the ranks takes as long as computing the gradients: gloo sends
them over TCP and waits in the kernel. Here each rank writes its gradients into shared memory, polls the counters of the
other ranks, and adds up all gradients in the order of the ranks. (`benchmarks/README.md` measures the difference.)
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

_FOLDER = Path("/dev/shm")
_MAX_BYTES = 64 * 2**20  # above this, gloo is as fast: bandwidth matters more than latency
_CACHE_LINE = 64  # bytes; each rank's counter has its own line
_YIELDS_AFTER_S = 0.002  # of polling; then other processes get the core


def use_if_possible(model: DistributedDataParallel) -> bool:
    """Sum a model's gradients through shared memory if all ranks can; return whether they do. All ranks must call it.

    Models with parameters that are not float32 are left to gloo.
    """
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        return False
    size = sum(parameter.numel() for parameter in model.parameters())
    memory = open_together(size)
    if memory is None:
        return False
    exchanged = Exchange(memory, dist.get_rank(), dist.get_world_size(), size)

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP cannot read postponed annotations
        gradients = bucket.buffer()
        torch.sum(exchanged(gradients.div_(dist.get_world_size())), 0, out=gradients)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(gradients)
        return done

    model.register_comm_hook(None, hook)
    return True


def is_supported() -> bool:
    """Return whether this is Linux on a processor that makes writes visible in order (x86-64)."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


class Exchange:
    """Exchanges vectors of float32 between ranks, of at most ``size`` numbers. All ranks make the same calls."""

    def __init__(self, memory: mmap.mmap, rank: int, world_size: int, size: int) -> None:
        counters = np.frombuffer(memory, np.int64, world_size * _CACHE_LINE // 8)
        self._counters = counters.reshape(world_size, -1)[:, 0]
        rows = np.frombuffer(memory, np.float32, 2 * world_size * size, offset=counters.nbytes)
        self._rows = torch.from_numpy(rows).view(2, world_size, size)
        self._rank = rank
        self._calls = 0

    def __call__(self, vector: Tensor) -> Tensor:
        """Return the vectors of all ranks, (ranks, numbers); valid until the next call."""
        self._calls += 1
        # Two buffers alternate. A rank can be one call ahead, never two, so nobody reads the buffer that it writes.
        buffer = self._rows[self._calls % 2, :, : len(vector)]
        buffer[self._rank].copy_(vector)
        self._counters[self._rank] = self._calls
        start = time.perf_counter()
        while (self._counters < self._calls).any():
            time.sleep(0 if time.perf_counter() - start < _YIELDS_AFTER_S else 5e-5)
        return buffer


def open_together(size: int) -> mmap.mmap | None:
    """Return zeroed memory that all ranks share; None on all ranks if any cannot map it. All ranks must call it."""
    num_bytes = dist.get_world_size() * (_CACHE_LINE + 2 * size * 4)
    with contextlib.ExitStack() as removed:  # the file; the memory stays until the last rank has closed it
        names = [_create_file(num_bytes, removed) if dist.get_rank() == 0 and is_supported() else ""]
        dist.broadcast_object_list(names, src=0)
        memory = _mapped(names[0]) if is_supported() else None
        has_all = torch.tensor(int(memory is not None))
        dist.all_reduce(has_all, dist.ReduceOp.MIN)
    return memory if has_all.item() else None


def _create_file(num_bytes: int, removed: contextlib.ExitStack) -> str:
    """Create a file of zeros that exists until ``removed`` exits; return its name, or "" if it would be too large."""
    if num_bytes > _MAX_BYTES:
        return ""
    with contextlib.suppress(OSError):  # there is no such folder, or no room: a full memory would kill us later
        created = removed.enter_context(tempfile.NamedTemporaryFile(prefix="mnist_ray-", dir=_FOLDER))  # noqa: SIM115
        os.posix_fallocate(created.fileno(), 0, num_bytes)
        return Path(created.name).name
    return ""


def _mapped(name: str) -> mmap.mmap | None:
    with contextlib.suppress(OSError), (_FOLDER / name).open("r+b") as file:  # created elsewhere, or not at all
        return mmap.mmap(file.fileno(), 0)
    return None
