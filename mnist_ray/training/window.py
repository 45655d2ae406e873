"""The window of steps between two reports."""

from __future__ import annotations

import functools
import math
import operator
import time
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mnist_ray.errors import TrainingStoppedError
from mnist_ray.parallel.group import Group
from mnist_ray.training.events import Progress
from mnist_ray.training.metrics import WEIGHT, MetricSums, TrainingDivergedError
from mnist_ray.training.parts import names_of_rates
from mnist_ray.training.state import TrainingState
from mnist_ray.training.stopwatch import CALLBACKS, PARTS, WORKERS
from mnist_ray.workload.base import Workload
from mnist_ray.workload.figures import Figure

_FIRST_INTERVAL_STEPS = 10
_REPORT_INTERVAL_S = 0.5


class LoggingWindow:
    """The steps since the last report. Their sums stay on the device until the window is closed.

    Within an epoch, ranks communicate only for gradients and when a window closes. Rank 0's clock sets the length of
    the next window in steps, so that all ranks close it at the same step.
    """

    def __init__(self, workload: Workload, group: Group) -> None:
        self._workload, self._group = workload, group
        self._interval_steps = _FIRST_INTERVAL_STEPS
        self._sums: list[dict[str, Tensor]] = []  # of each step, on this rank
        self._sizes: list[int] = []  # of each step's global batch
        self._others: dict[Figure, list[Tensor]] = {}  # on this rank; all ranks have the same figures
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time since the last window, which was spent on saving or between epochs."""
        self._start = time.perf_counter()

    def add(self, sums: dict[str, Tensor], global_size: int, others: Mapping[Figure, Tensor]) -> None:
        """Add a step: sums on this rank, one or a row of the chunks'; global batch size; figures that are not means."""
        self._sums.append(sums)
        self._sizes.append(global_size)
        for figure, value in others.items():
            self._others.setdefault(figure, []).append(value)

    def is_full(self, steps_left: int) -> bool:
        """Return whether to close the window. It stays open if an epoch's last steps are too few for another."""
        return steps_left == 0 or (len(self._sizes) >= self._interval_steps and 2 * steps_left >= self._interval_steps)

    def close(self, state: TrainingState, *, stop_wanted: bool, save_wanted: bool) -> Progress:
        """Sum the window over all ranks, add it to ``state``, and empty it. Raises TrainingDivergedError."""
        state.watch.turn(WORKERS)
        sums, ranks, of_first = self._reduce(state, stop_wanted, save_wanted)
        state.watch.turn(CALLBACKS)
        losses = self._losses(sums, state)
        progress = self._report(sums, losses, ranks, of_first, state)
        self._sums, self._sizes, self._others = [], [], {}
        return progress

    def _reduce(
        self, state: TrainingState, *wishes: bool
    ) -> tuple[dict[str, np.ndarray], list[list[float]], list[float]]:
        """Return the steps' sums over all ranks, (steps,) by name; a row for each rank; and rank 0's decisions."""
        names = list(self._sums[0])
        sums = torch.stack([step[name] for step in self._sums for name in names]).double()
        if sums.is_cuda:
            torch.cuda.synchronize()  # otherwise unfinished kernels would be timed in the next window
        now = time.perf_counter()
        elapsed_s, self._start = now - self._start, now
        next_interval = max(1, round(len(self._sizes) * _REPORT_INTERVAL_S / max(elapsed_s, 1e-3)))
        of_first = sums.new_tensor([next_interval, elapsed_s, *wishes])
        others = [figure.join(torch.stack(values).tolist()) for figure, values in self._others.items()]
        ranks = sums.new_zeros(self._group.world_size, len(PARTS) + len(others))  # each rank fills its row
        ranks[self._group.rank] = sums.new_tensor([*state.watch.taken(), *others])
        if self._group.world_size > 1:
            whole = torch.cat([sums.view(-1), ranks.view(-1)])
            dist.all_reduce(whole)
            dist.broadcast(of_first, 0)
            sums, ranks = whole[: sums.numel()].view_as(sums), whole[sums.numel() :].view_as(ranks)
        if sums.dim() > 1:
            sums = functools.reduce(operator.add, sums.unbind(1))  # chunk by chunk, in double
        columns = sums.view(-1, len(names)).T.cpu().numpy()
        return dict(zip(names, columns, strict=True)), ranks.tolist(), of_first.tolist()

    def _losses(self, sums: Mapping[str, np.ndarray], state: TrainingState) -> list[float]:
        """Return each step's mean loss: NaN if it has no weight.

        Raises TrainingStoppedError for a wrong sum of weights, TrainingDivergedError if a loss is not finite.
        """
        weights, first = sums.get(WEIGHT, np.array(self._sizes)), state.step - len(self._sizes) + 1
        for number, (weight, loss) in enumerate(zip(weights.tolist(), sums["loss"].tolist(), strict=True), first):
            if not weight >= 0:
                found = f"one in step {number} of epoch {state.epoch + 1} is negative or NaN"
                raise TrainingStoppedError(f"{type(self._workload).__name__}.weights: {found}; leave it out")
            if not math.isfinite(loss):
                raise TrainingDivergedError(state.epoch + 1, number)
        losses: list[float] = (sums["loss"] / np.where(weights > 0, weights, math.nan)).tolist()
        return losses

    def _report(
        self,
        sums: Mapping[str, np.ndarray],
        losses: list[float],
        ranks: list[list[float]],
        of_first: list[float],
        state: TrainingState,
    ) -> Progress:
        """Add the steps to ``state``, and return the progress."""
        next_interval, elapsed_s, stop_wanted, save_wanted = of_first
        self._interval_steps = int(next_interval)
        state.epoch_s += elapsed_s
        num_examples = sum(self._sizes)
        state.sums = state.sums.plus(sums, num_examples)
        columns = [*zip(*ranks, strict=True)][len(PARTS) :]
        rates = state.learning_rates
        others = {figure.name: figure.join(column) for figure, column in zip(self._others, columns, strict=True)}
        others |= dict(zip(names_of_rates(state.optimizer), rates, strict=False)) if len(rates) > 1 else {}
        return Progress(
            epoch=state.epoch + 1,
            step=state.step,
            epoch_steps=state.epoch_steps,
            losses=losses,
            window=MetricSums().plus(sums, num_examples).values(self._workload),
            so_far=state.sums.values(self._workload),
            num_examples=state.sums.num_examples,
            epoch_s=state.epoch_s,
            learning_rate=rates[0] if rates else math.nan,
            total_step=state.total_step,
            saves=bool(stop_wanted or save_wanted),
            stops=bool(stop_wanted),
            parts=[row[: len(PARTS)] for row in ranks],
            others=others,
        )
