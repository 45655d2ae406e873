"""A worker's signs of life: if the worker hangs, the user learns where, and the process exits."""

from __future__ import annotations

import faulthandler
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mnist_ray.job.job import Job
from mnist_ray.parallel import shared_memory
from mnist_ray.process import end_if_hung
from mnist_ray.training.events import Event, Note, WorkerAlive
from mnist_ray.training.state import TrainingState
from mnist_ray.training.stopwatch import PARTS, START, STORAGE

SHOWN_EVERY_S = 0.1  # at most: each sign of life starts a thread with a timer that ends this process when it expires
STORAGE_LIMIT_S = 3600.0  # for a checkpoint, in addition to hang_timeout_s
TOLD_EVERY_S = 5.0  # between two signs of life to the driver
_WAITING = ("/torch/distributed/", "/torch/autograd/graph.py", "/ray/", shared_memory.__file__)


class Life:
    """Ends this process if the worker in this thread hangs. Before that, sends the driver a note of where it hangs.

    With ``--num-workers 0``, there is no time limit: a debugger may pause the training.
    """

    def __init__(self, job: Job, rank: int, event_queue: Any = None) -> None:
        self.state: TrainingState | None = None  # as soon as there is one
        self._job, self._rank, self._thread = job, rank, threading.get_ident()
        self._shown_at, self._longer_s = -math.inf, 0.0
        self.show()
        if event_queue is not None:
            threading.Thread(target=self._tell, args=[event_queue.put.remote], daemon=True).start()

    def show(self, longer_s: float = 0.0) -> None:
        """Give the next part of the start, step or batch of a validation its full time limit plus ``longer_s``."""
        now, workers = time.monotonic(), self._job.workers
        if now - self._shown_at > SHOWN_EVERY_S or longer_s != self._longer_s:
            self._shown_at, self._longer_s = now, longer_s
            if workers.num_workers != 0:
                end_if_hung(workers.hang_timeout_s + longer_s)

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *raised: object) -> None:
        """Set no further limit."""
        self._shown_at = math.inf
        faulthandler.cancel_dump_traceback_later()

    def _tell(self, put: Callable[[Event], object]) -> None:
        """Report this worker's progress to the driver until the process exits."""
        timeout_s, noted = self._job.workers.hang_timeout_s, -math.inf
        while True:
            part, shown_at = self.state.watch.part if self.state else START, self._shown_at
            silent_s = 0.0 if part == STORAGE else max(0.0, time.monotonic() - shown_at)
            put(WorkerAlive(silent_s))
            if silent_s > (timeout_s + self._longer_s) / 2 and noted != shown_at:
                silence = f"has made no progress for {silent_s:.0f} s of hang_timeout_s {timeout_s:g}"
                put(Note(f"worker {self._rank} {silence}: it is in {self._place(part)}"))
                noted = shown_at
            time.sleep(min(TOLD_EVERY_S, timeout_s / 4))

    def _place(self, part: str) -> str:
        """Return the innermost function, the innermost line of the user's code, and the part of the training."""
        stack = [(frame.f_code, line) for frame, line in traceback.walk_stack(sys._current_frames().get(self._thread))]
        code, folders = stack[0][0], {*self._job.code_folders}
        of_user = ((Path(own.co_filename), line) for own, line in stack)
        lines = [f" ({file.name}, line {line})" for file, line in of_user if folders & {*file.parents}]
        when = START
        if self.state is not None and part != START:
            when = f"{PARTS[part]} after step {self.state.step} of epoch {self.state.epoch + 1}"
        place = f"{code.co_name}{''.join(lines[:1])}, {when}"
        if any(name in code.co_filename for name in _WAITING):
            place += "; it waits for another worker: check that all run the same parts of the model and the callback"
        return place
