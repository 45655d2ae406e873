"""The window of steps between two reports: when it closes, what it reports, and what all ranks do then."""

from __future__ import annotations

import functools
import math
import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mnist_ray.config import TrainConfig
from mnist_ray.errors import TrainingStoppedError
from mnist_ray.parallel.group import Group
from mnist_ray.training.callback import Callback
from mnist_ray.training.events import Progress
from mnist_ray.training.metrics import WEIGHT, MetricSums, TrainingDivergedError, check_logged, missing_sum
from mnist_ray.training.state import TrainingState, is_validation_due
from mnist_ray.training.stopwatch import CALLBACKS, WORKERS
from mnist_ray.workload.base import Workload
from mnist_ray.workload.figures import GRADIENT_NORM

_FIRST_INTERVAL_STEPS = 10
_REPORT_INTERVAL_S = 0.5
_SAVE_INTERVAL_S = 60.0  # without --checkpoint-every


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a window of steps: rank 0 decides."""

    saves: bool
    stops: bool  # after saving
    elapsed_s: float  # seconds of training in the window
    next_interval: int  # steps until the next window closes


@dataclass(frozen=True)
class _Part:
    """A rank's part of a window's report."""

    decision: Decision  # that of rank 0 counts
    sums: Mapping[str, np.ndarray]  # by name, (steps,) or, with --reproducible, (steps, chunks)
    seconds: Sequence[float]  # by part of the rank's time


class LoggingWindow:
    """The steps since the last report. It closes about twice a second, and where a checkpoint is due.

    Within an epoch, ranks communicate only for gradients and when a window closes: until then, sums stay on the device.
    Rank 0's clock sets the length of the next window in steps, so that all ranks close it at the same step.
    """

    def __init__(self, workload: Workload, state: TrainingState, config: TrainConfig, group: Group) -> None:
        self._workload, self._state, self._group = workload, state, group
        self._config = config
        self._interval_steps = _FIRST_INTERVAL_STEPS
        self._sums: list[Mapping[str, Tensor]] = []  # of each step, on this rank
        self._sizes: list[int] = []  # of each step's global batch
        self._norms: list[Tensor] = []  # of the gradients, before clipping; all ranks have the same
        self.restart_clock()

    def restart_clock(self) -> None:
        """Do not count the time since the last window, which was spent on saving or between epochs."""
        self._start = self._saved_at = time.perf_counter()

    def add(self, sums: Mapping[str, Tensor], global_size: int, gradient_norm: Tensor | None) -> None:
        """Add a step: its sums on this rank, one number or a row of the chunks' each, and its global batch size."""
        self._sums.append(sums)
        self._sizes.append(global_size)
        if gradient_norm is not None:
            self._norms.append(gradient_norm)

    def is_due(self) -> bool:
        """Return whether to close the window now, on all ranks alike.

        It stays open if an epoch's last steps are too few for another.
        """
        steps_left = self._state.epoch_steps - self._state.step
        is_full = len(self._sizes) >= self._interval_steps and 2 * steps_left >= self._interval_steps
        return steps_left == 0 or is_full or self._must_save()

    def _must_save(self) -> bool:
        state, every = self._state, self._config.checkpoint_every
        is_checkpoint = every is not None and state.step % every == 0
        return state.total_step == state.last_step or is_checkpoint or is_validation_due(state, self._config)

    def close(self, callbacks: Sequence[Callback]) -> Progress:
        """Sum the window over all ranks, add it to the state, and empty it; all ranks must call this.

        Raises TrainingStoppedError for a wrong sum of weights, TrainingDivergedError if a loss is not finite.
        """
        watch = self._state.watch
        if self._group.device.type == "cuda":
            torch.cuda.synchronize()  # otherwise unfinished kernels would be timed in the next window
        decision = self._decide(callbacks)
        watch.turn(WORKERS)
        parts = self._group.gathered(_Part(decision, self._sums_here(), watch.taken()))
        watch.turn(CALLBACKS)
        decision = parts[0].decision
        self._interval_steps = decision.next_interval
        progress = self._progress(decision, _added_up([part.sums for part in parts]), [part.seconds for part in parts])
        for of_steps in (self._sums, self._sizes, self._norms):
            of_steps.clear()
        return progress

    def _decide(self, callbacks: Sequence[Callback]) -> Decision:
        state = self._state
        now = time.perf_counter()
        elapsed_s, self._start = now - self._start, now
        stops = state.total_step == state.last_step or any(callback.wants_stop() for callback in callbacks)
        is_old = self._config.checkpoint_every is None and now - self._saved_at > _SAVE_INTERVAL_S
        next_interval = max(1, round(len(self._sizes) * _REPORT_INTERVAL_S / max(elapsed_s, 1e-3)))
        return Decision(is_old or stops or self._must_save(), stops, elapsed_s, next_interval)

    def _sums_here(self) -> dict[str, np.ndarray]:
        """Return the steps' sums on this rank, by name, in double. A step that has not logged a value counts as 0."""
        names = [*dict.fromkeys(name for step in self._sums for name in step)]
        missing = {name: torch.full_like(self._sums[0]["loss"], missing_sum(name)) for name in names}
        rows = [step.get(name, missing[name]) for name in names for step in self._sums]
        values = torch.stack(rows).double().cpu().numpy()  # in one transfer
        return dict(zip(names, np.split(values, len(names)), strict=True))

    def _progress(
        self, decision: Decision, sums: Mapping[str, np.ndarray], seconds: Sequence[Sequence[float]]
    ) -> Progress:
        """Return the report of a window, whose ``sums`` over all ranks count in the epoch's from now on."""
        state, num_examples = self._state, sum(self._sizes)
        losses = self._losses(sums)
        state.epoch_s += decision.elapsed_s
        state.sums = state.sums.plus(sums, num_examples)
        window = MetricSums().plus(sums, num_examples)
        others = window.logged
        check_logged(self._workload, others)
        if self._norms:
            others[GRADIENT_NORM.name] = GRADIENT_NORM.join(torch.stack(self._norms).tolist())
        return Progress(
            epoch=state.epoch + 1,
            step=state.step,
            epoch_steps=state.epoch_steps,
            losses=losses,
            window=window.values(self._workload),
            so_far=state.sums.values(self._workload),
            num_examples=state.sums.num_examples,
            epoch_s=state.epoch_s,
            learning_rate=state.learning_rate,
            total_step=state.total_step,
            saves=decision.saves,
            stops=decision.stops,
            parts=seconds,
            others=others,
            logged=state.sums.logged,
        )

    def _losses(self, sums: Mapping[str, np.ndarray]) -> list[float]:
        """Return each step's mean loss: NaN if it has no weight."""
        weights = sums.get(WEIGHT, np.array(self._sizes))
        epoch, first = self._state.epoch + 1, self._state.step - len(self._sizes) + 1
        for number, (weight, loss) in enumerate(zip(weights.tolist(), sums["loss"].tolist(), strict=True), first):
            if not weight >= 0:
                found = f"one in step {number} of epoch {epoch} is negative or NaN"
                raise TrainingStoppedError(f"{type(self._workload).__name__}.weights: {found}; leave it out")
            if not math.isfinite(loss):
                raise TrainingDivergedError(epoch, number)
        losses: list[float] = (sums["loss"] / np.where(weights > 0, weights, math.nan)).tolist()
        return losses


def _added_up(of_ranks: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the sums over ranks and chunks, in their order, (steps,) by name. Ranks may have logged other names."""
    total = dict[str, np.ndarray]()
    for name in dict.fromkeys(name for sums in of_ranks for name in sums):
        total[name] = functools.reduce(operator.add, [sums[name] for sums in of_ranks if name in sums])
        if total[name].ndim > 1:
            total[name] = functools.reduce(operator.add, total[name].T)  # chunk by chunk
    return total
