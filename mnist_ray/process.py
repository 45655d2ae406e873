"""The state of this process: signals, warnings, threads, the allocator, the time limit for hangs."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from mnist_ray.errors import JobError
from mnist_ray.signals import take_signals

T = TypeVar("T")

_CGROUP = Path("/sys/fs/cgroup")
# Variables that a job changes. Ray keeps the token that it reads.
_CHANGED = re.compile(r"(MNIST_)?RAY_(?!AUTH_TOKEN)|TUNE_|PYTHON(BREAKPOINT|SAFEPATH)|GOMP_")
_busy = threading.RLock()  # a workload may itself load a run
filters = threading.Lock()  # for warning filters, which all threads share
_SET_EVERY_S = 0.1  # at most: each limit starts a thread that ends this process when it expires
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # constants of malloc.h


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Turn the garbage collector off while the block imports large packages: it would take a fifth of the time."""
    is_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_on:
            gc.enable()


@contextlib.contextmanager
def left_as_found() -> Iterator[None]:
    """Handle the signals that end a job; at the end, restore what the job, Ray or Tune changed in this process.

    Raises JobError if another thread is in such a block: both would seed the same generators and share one Ray.
    """
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    variables = {name: value for name, value in os.environ.items() if _CHANGED.match(name)}
    levels = {logger: logger.level for logger in map(logging.getLogger, ("ray", "ray.widgets.util"))}
    torch: Any = sys.modules.get("torch")  # which another thread may be importing
    threads = torch.get_num_threads() if hasattr(torch, "get_num_threads") else usable_cores()
    if not _busy.acquire(blocking=False):
        raise JobError("this process is busy with another call; wait until it ends, or make this call in a new process")
    try:
        take_signals()
        with contextlib.ExitStack() as at_the_end:
            with filters:
                at_the_end.enter_context(warnings.catch_warnings())
            yield
    finally:
        _busy.release()
        for name in [*filter(_CHANGED.match, os.environ)]:
            del os.environ[name]
        os.environ.update(variables)
        for logger, level in levels.items():
            logger.setLevel(level)
        torch = sys.modules.get("torch")
        if hasattr(torch, "set_num_threads"):
            torch.set_num_threads(threads)
        with contextlib.suppress(ValueError):  # not in the main thread, so no handler was changed
            for number in [number for number, handler in handlers.items() if signal.getsignal(number) is not handler]:
                signal.signal(number, handlers[number])


def keep_freed_memory(*, is_sharded: bool = False) -> None:
    """Let this process keep freed memory instead of returning it to the kernel. This needs glibc's allocator.

    Each step allocates memory for activations and frees it. In Ray Train's workers, glibc returned it to the kernel
    each time, and page faults took a third of the training time.

    ``is_sharded``: return large blocks nevertheless. FSDP and gloo need buffers of many sizes, and a freed one rarely
    fits the next request: kept buffers took a fifth of a worker's memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    largest_kept = 2**22 if is_sharded else 2**30
    # Older versions of glibc accept at most 32 MiB. Setting only one threshold is worse than setting neither.
    if mallopt and (mallopt(_M_MMAP_THRESHOLD, largest_kept) or mallopt(_M_MMAP_THRESHOLD, 2**25)):
        mallopt(_M_TRIM_THRESHOLD, 2**30)


class Watchdog:
    """Ends this process, with all stacks in its log, if there is no heartbeat for ``timeout_s``; 0: it never does."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._set_at, self._longer_s = timeout_s, -math.inf, 0.0

    def __enter__(self) -> Watchdog:
        self.heartbeat()
        return self

    def heartbeat(self, longer_s: float = 0.0) -> None:
        """Give what comes next, such as a step or a batch of a validation, the full time limit plus ``longer_s``."""
        now = time.monotonic()
        if self._timeout_s and (now - self._set_at > _SET_EVERY_S or longer_s != self._longer_s):
            self._set_at, self._longer_s = now, longer_s
            faulthandler.dump_traceback_later(self._timeout_s + longer_s, exit=True, file=2)

    def __exit__(self, *raised: object) -> None:
        """Set no further limit."""
        faulthandler.cancel_dump_traceback_later()


def usable_cores() -> int:
    """Return the number of cores that this process may use, given its affinity and its cgroup's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # of cgroup v2 and v1
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or no quota ("max")
            quota, period = " ".join((_CGROUP / file).read_text(encoding="ascii") for file in files).split()
            cores = min(cores, max(1, int(quota) // int(period))) if int(quota) > 0 else cores
    return cores


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Call a function in a daemon thread: it may wait forever, and Python must still be able to exit."""
    result: Future[T] = Future()

    def call() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return result
