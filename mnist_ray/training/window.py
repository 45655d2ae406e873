"""The steps between two reports of progress: sums that stay on the device, and when they are reduced."""

from __future__ import annotations

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

from mnist_ray.training.events import Progress
from mnist_ray.training.metrics import MetricSums
from mnist_ray.training.state import Group, TrainingDivergedError, TrainingState
from mnist_ray.workload.base import Workload

_FIRST_INTERVAL_STEPS = 10
_REPORT_INTERVAL_S = 0.5


class LoggingWindow:
    """The steps since the last progress: their figures stay on the device until the window is closed.

    Closing it is the only time at which ranks talk besides the gradients. Rank 0's clock decides for all ranks after
    how many steps the next one closes, so that every rank closes at the same step.
    """

    def __init__(self, workload: Workload, group: Group) -> None:
        self._workload = workload
        self._group = group
        self.stops = False  # whether rank 0 wanted to stop when the window was closed last
        self._reset(_FIRST_INTERVAL_STEPS)
        self.restart_clock()

    def _reset(self, interval_steps: int) -> None:
        self._interval_steps = interval_steps
        self._steps: list[dict[str, Tensor]] = []
        self._sizes: list[int] = []

    def restart_clock(self) -> None:
        """Leave out of the epoch's seconds what was done since the window opened."""
        self._start = time.perf_counter()

    def add(self, sums: dict[str, Tensor], global_size: int) -> None:
        """Add a step: its sums on this rank, and the size of its global batch."""
        self._steps.append(sums)
        self._sizes.append(global_size)

    def is_full(self, steps_left: int) -> bool:
        """Tell whether to close it: an epoch's last steps, too few for a window of their own, belong to this one."""
        return steps_left == 0 or (len(self._sizes) >= self._interval_steps and 2 * steps_left >= self._interval_steps)

    def close(self, state: TrainingState, num_steps: int, *, stop_wanted: bool) -> Progress:
        """Reduce the window over all ranks into ``state`` and empty it. Raises TrainingDivergedError."""
        steps, interval_steps, elapsed_s = self._reduce(stop_wanted)
        window = MetricSums()
        for offset, step in enumerate(steps):
            if not math.isfinite(step.sums["loss"]):
                raise TrainingDivergedError(state.epoch + 1, state.step - len(steps) + offset + 1)
            window += step
            state.sums += step  # one by one: its bits do not depend on when windows close
        state.epoch_s += elapsed_s
        self._reset(interval_steps)
        return Progress(
            state.epoch + 1,
            state.step,
            num_steps,
            [step.sums["loss"] / step.num_examples for step in steps],
            window.values(self._workload),
            state.sums.values(self._workload),
            state.sums.num_examples,
            state.epoch_s,
        )

    def _reduce(self, stop_wanted: bool) -> tuple[list[MetricSums], int, float]:
        """Return the sums of each step over all ranks, the steps of the next window, and the seconds of this one."""
        names = list(self._steps[0])
        sums = torch.stack([step[name] for step in self._steps for name in names]).double()
        if sums.is_cuda:
            torch.cuda.synchronize()  # else the last steps' time would be the next window's
        now = time.perf_counter()
        elapsed_s, self._start = now - self._start, now
        next_interval = max(1, round(len(self._sizes) * _REPORT_INTERVAL_S / max(elapsed_s, 1e-3)))
        settled = [next_interval, stop_wanted, elapsed_s] if self._group.rank == 0 else [0, 0, 0]
        values = torch.cat([sums, sums.new_tensor(settled)])
        if self._group.world_size > 1:
            dist.all_reduce(values)
        of_steps = values[: -len(settled)].view(-1, len(names)).tolist()
        interval_steps, self.stops, elapsed_s = int(values[-3]), bool(values[-2]), float(values[-1])
        steps = [
            MetricSums(dict(zip(names, of_step, strict=True)), size)
            for of_step, size in zip(of_steps, self._sizes, strict=True)
        ]
        return steps, interval_steps, elapsed_s
