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
    """The steps since the last progress: their sums stay on the device until the window is closed.

    Within an epoch, ranks talk only for gradients and when a window closes. Rank 0's clock sets the next window's
    length in steps for all ranks, so that every rank closes it at the same step.
    """

    def __init__(self, workload: Workload, group: Group) -> None:
        self._workload, self._group = workload, group
        self._interval_steps = _FIRST_INTERVAL_STEPS
        self._sums: list[dict[str, Tensor]] = []  # of each step, on this rank
        self._sizes: list[int] = []  # of each step's global batch
        self.stops = False  # whether rank 0 wanted to stop when the window was closed last
        self.restart_clock()

    def restart_clock(self) -> None:
        """Restart the clock, so that the time spent on saving or between epochs is not counted."""
        self._start = time.perf_counter()

    def add(self, sums: dict[str, Tensor], global_size: int) -> None:
        """Add a step: its sums on this rank, and the size of its global batch."""
        self._sums.append(sums)
        self._sizes.append(global_size)

    def is_full(self, steps_left: int) -> bool:
        """Tell whether to close it: an epoch's last steps, too few for a window of their own, belong to this one."""
        return steps_left == 0 or (len(self._sizes) >= self._interval_steps and 2 * steps_left >= self._interval_steps)

    def close(self, state: TrainingState, num_steps: int, *, stop_wanted: bool) -> Progress:
        """Reduce the window over all ranks into ``state`` and empty it. Raises TrainingDivergedError."""
        names = list(self._sums[0])
        sums = torch.stack([step[name] for step in self._sums for name in names]).double()
        if sums.is_cuda:
            torch.cuda.synchronize()  # else unfinished kernels would be timed in the next window
        now = time.perf_counter()
        elapsed_s, self._start = now - self._start, now
        next_interval = max(1, round(len(self._sizes) * _REPORT_INTERVAL_S / max(elapsed_s, 1e-3)))
        agreed = sums.new_tensor([next_interval, stop_wanted, elapsed_s])
        if self._group.world_size > 1:
            dist.all_reduce(sums)
            dist.broadcast(agreed, 0)
        rows = sums.view(-1, len(names)).tolist()
        of_steps = [dict(zip(names, row, strict=True)) for row in rows]
        steps = [MetricSums(of_step, size) for of_step, size in zip(of_steps, self._sizes, strict=True)]
        window = MetricSums()
        for offset, step in enumerate(steps):
            if not math.isfinite(step.sums["loss"]):
                raise TrainingDivergedError(state.epoch + 1, state.step - len(steps) + offset + 1)
            window += step
            state.sums += step  # one by one: its bits do not depend on when windows close
        self._sums, self._sizes = [], []
        self._interval_steps, self.stops = int(agreed[0]), bool(agreed[1])
        state.epoch_s += float(agreed[2])
        return Progress(
            epoch=state.epoch + 1,
            step=state.step,
            num_steps=num_steps,
            losses=[step.sums["loss"] / step.num_examples for step in steps],
            window=window.values(self._workload),
            so_far=state.sums.values(self._workload),
            num_examples=state.sums.num_examples,
            epoch_s=state.epoch_s,
        )
