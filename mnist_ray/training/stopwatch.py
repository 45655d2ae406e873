"""Where a worker's time goes, and when a checkpoint is worth its cost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, TypeVar

DATA, COPIES, COMPUTE, WORKERS, OPTIMIZER = "data", "copies", "compute", "workers", "optimizer"
CALLBACKS, CHECKPOINTS, STORAGE, VALIDATION, START = "callbacks", "checkpoints", "storage", "validation", "start"
PARTS = {  # with their names on the console and in the report
    DATA: "data",  # waiting for the next batch
    COPIES: "copies",  # copying it to the device
    COMPUTE: "compute",  # forward and backward pass
    WORKERS: "other workers",  # waiting for their gradients, and adding them up
    OPTIMIZER: "optimizer",  # its step, those of the schedule and of the EMA
    CALLBACKS: "callbacks",  # the user's, and reports of progress
    CHECKPOINTS: "checkpoints",  # standing still while the state is copied
    STORAGE: "storage",  # standing still until the previous checkpoint is stored
    VALIDATION: "validation",
    START: "first step",  # from the creation of the model to the end of the first step: data, compilation, caches
}

Item = TypeVar("Item")
_MAX_COST = 0.01  # of the time since the last checkpoint
_FIRST_S = 5.0  # of training before the first checkpoint, whose cost is not known yet


class Stopwatch:
    """Divides this process's time among PARTS: each moment belongs to one.

    On a GPU, times are measured on the GPU. Moments are events in its stream, so measuring never waits.
    """

    def __init__(self, *, is_on_gpu: bool = False) -> None:
        self.is_on_gpu, self._has_started = is_on_gpu, False
        self._turns: list[tuple[Any, str]] = [(self.now(), START)]

    def now(self) -> Any:
        """Return this moment; on a GPU, the moment at which it has done all work so far."""
        if not self.is_on_gpu:
            return time.perf_counter()
        from torch.cuda import Event

        event = Event(enable_timing=True)
        event.record()
        return event

    @property
    def part(self) -> str:
        """The part to which this moment belongs."""
        return self._turns[-1][1]

    def turn(self, part: str) -> None:
        """Count the time from now on as ``part``."""
        self._turns.append((self.now(), part))

    @contextlib.contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Count the time of a block as ``part``, then return to the previous part."""
        before = self.part
        self.turn(part)
        try:
            yield
        finally:
            self.turn(before)

    def iterating(self, part: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; count the time until each comes as ``part``, and then go on with COMPUTE."""
        iterator = iter(items)
        while True:
            self.turn(part)
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.turn(COMPUTE)
            yield item

    def end_start(self) -> None:
        """The first time, count everything before the current part as START."""
        if not self._has_started:
            self._has_started = True
            *before, last = self._turns
            self._turns = [*((moment, START) for moment, _ in before), last]

    def taken(self) -> list[float]:
        """Return the seconds of each of PARTS from the last call to the last turn, which a GPU must have reached."""
        seconds = dict.fromkeys(PARTS, 0.0)
        for (start, part), (end, _) in pairwise(self._turns):
            seconds[part] += start.elapsed_time(end) / 1000 if self.is_on_gpu else end - start
        self._turns = self._turns[-1:]
        return list(seconds.values())


class Pace:
    """Decides when to save within an epoch: if a checkpoint costs at most 1 % of the time since the last one.

    The cost is the time for which training stands still, plus the processor time of the thread that writes it.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._saved_at = now, now()
        self._stall_s, self._write_s = _FIRST_S * _MAX_COST, 0.0
        self._written = threading.Event()
        self._written.set()

    def is_due(self) -> bool:
        """Return whether to save now. Only one checkpoint is written at a time."""
        is_cheap = self._now() - self._saved_at > (self._stall_s + self._write_s) / _MAX_COST
        return self._written.is_set() and is_cheap

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Measure the block in which training stands still for a checkpoint."""
        began_at = self._now()
        yield
        self._saved_at = self._now()
        self._stall_s = self._saved_at - began_at

    def wait(self) -> None:
        """Wait until no checkpoint is being written, and announce the next one."""
        self._written.wait()
        self._written.clear()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Measure the block, in a thread of its own, that writes the announced checkpoint."""
        start = time.thread_time()
        try:
            yield
        finally:
            self._write_s = time.thread_time() - start
            self._written.set()
