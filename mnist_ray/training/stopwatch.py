"""Where a worker's time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
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
