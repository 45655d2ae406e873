"""When all ranks report, save and stop: rank 0 decides, and the others follow."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mnist_ray.config import TrainConfig
from mnist_ray.parallel.group import Group
from mnist_ray.training.callback import Callback
from mnist_ray.training.state import TrainingState

MAX_STEPS_UNSAVED = 1000  # without --checkpoint-every
_FIRST_INTERVAL_STEPS = 10
_REPORT_INTERVAL_S = 0.5


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a window of steps."""

    saves: bool
    stops: bool  # after saving
    elapsed_s: float  # seconds of training in the window
    next_interval: int  # steps until the next window closes


class Cadence:
    """Closes a window of steps about twice a second, and where a checkpoint is due.

    Within an epoch, ranks communicate only for gradients and when a window closes. Rank 0's clock sets the length of
    the next window in steps, so that all ranks close it at the same step.
    """

    def __init__(self, config: TrainConfig, group: Group) -> None:
        self._every, self._group = config.checkpoint_every, group
        self._interval_steps = _FIRST_INTERVAL_STEPS
        self.restart_clock()

    def restart_clock(self) -> None:
        """Do not count the time since the last window, which was spent on saving or between epochs."""
        self._start = time.perf_counter()

    def is_due(self, state: TrainingState, num_steps: int) -> bool:
        """Return whether to close a window of ``num_steps``, on all ranks alike.

        It stays open if an epoch's last steps are too few for another.
        """
        steps_left = state.epoch_steps - state.step
        is_full = num_steps >= self._interval_steps and 2 * steps_left >= self._interval_steps
        return steps_left == 0 or is_full or self._must_save(state)

    def decide(self, state: TrainingState, num_steps: int, callbacks: Sequence[Callback]) -> Decision:
        """Return rank 0's decision after a window of ``num_steps``; all ranks must call this."""
        if self._group.device.type == "cuda":
            torch.cuda.synchronize()  # otherwise unfinished kernels would be timed in the next window
        now = time.perf_counter()
        elapsed_s, self._start = now - self._start, now
        must_save = self._must_save(state)
        stops = state.total_step == state.last_step or any(callback.wants_stop() for callback in callbacks)
        saves = must_save if self._every is not None else state.pace.is_due(at_any_cost=must_save)
        next_interval = max(1, round(num_steps * _REPORT_INTERVAL_S / max(elapsed_s, 1e-3)))
        decisions = [Decision(saves or stops, stops, elapsed_s, next_interval)]
        if self._group.world_size > 1:
            dist.broadcast_object_list(decisions, 0)
        self._interval_steps = decisions[0].next_interval
        return decisions[0]

    def _must_save(self, state: TrainingState) -> bool:
        return state.total_step == state.last_step or state.step % (self._every or MAX_STEPS_UNSAVED) == 0
