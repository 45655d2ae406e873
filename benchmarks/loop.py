"""Time steps of the project's engine, for other benchmarks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from mnist_ray.cluster.environment import keep_freed_memory
from mnist_ray.config import TrainConfig
from mnist_ray.training import engine
from mnist_ray.training.callback import Callback
from mnist_ray.training.events import Progress
from mnist_ray.training.state import Group, StopWantedError, TrainingState
from mnist_ray.workload.base import Workload
from mnist_ray.workload.data import Split


@dataclass(frozen=True)
class Timed:
    """Measurements after a tenth of the steps, and at the end."""

    step_s: float
    """Seconds per step in between."""
    early: float
    """What ``look`` returned after a tenth of the steps."""
    late: float
    """What it returned at the end."""


class _Timer(Callback):
    """Records the time and the result of ``look`` about every half second; stops after ``num_steps``."""

    def __init__(self, num_steps: int, look: Callable[[], float]) -> None:
        self._num_steps, self._look = num_steps, look
        self.marks: list[tuple[int, float, float]] = []

    def on_progress(self, state: TrainingState, progress: Progress) -> None:
        self.marks.append((progress.total_step, time.perf_counter(), self._look()))

    def wants_stop(self) -> bool:
        return bool(self.marks) and self.marks[-1][0] >= self._num_steps


def timed_steps(
    workload: Workload,
    split: Split,
    config: TrainConfig,
    group: Group,
    num_steps: int,
    num_loaders: int = 0,
    look: Callable[[], float] = lambda: 0.0,
) -> Timed:
    """Train at least ``num_steps`` steps in this process, as a rank of ``group``."""
    keep_freed_memory()
    state = engine.create_state(workload, config, len(split), group)
    timer = _Timer(num_steps, look)
    with contextlib.suppress(StopWantedError):
        engine.train(workload, state, split, config, group, [timer], num_loaders)
    marks = timer.marks
    first, last = next(mark for mark in marks if mark[0] >= num_steps / 10), marks[-1]
    return Timed((last[1] - first[1]) / (last[0] - first[0]), first[2], last[2])
