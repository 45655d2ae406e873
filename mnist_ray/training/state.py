"""The state that training changes, this process's rank, and the window of steps between two reports."""

from __future__ import annotations

import functools
import io
import math
import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mnist_ray.config import TrainConfig
from mnist_ray.errors import TrainingStoppedError
from mnist_ray.training.callback import Callback
from mnist_ray.training.events import Progress
from mnist_ray.training.metrics import MetricSums, TrainingDivergedError
from mnist_ray.training.stopwatch import CALLBACKS, PARTS, WORKERS, Pace, Stopwatch
from mnist_ray.training.tensor_files import is_sharded, rows_here
from mnist_ray.workload.base import Workload

_FIRST_INTERVAL_STEPS = 10
_REPORT_INTERVAL_S = 0.5


class StopWantedError(Exception):
    """Training has saved a checkpoint and stopped, as it was asked to. Raised on every rank alike."""


@dataclass(frozen=True)
class Group:
    """This process's rank and device. With several ranks, ``torch.distributed`` is initialized."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass
class TrainingState:
    """Everything that training changes and a checkpoint holds; and two clocks, which it does not hold."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    epoch: int = 0  # finished epochs
    step: int = 0  # optimizer steps done in the current epoch
    sums: MetricSums = field(default_factory=MetricSums)  # over the current epoch so far and all ranks
    epoch_s: float = 0.0  # seconds of training in the current epoch: by rank 0's clock, without validating and saving
    finished_s: float = 0.0  # seconds of training in the finished epochs
    scaler: GradScaler = field(default_factory=lambda: GradScaler(enabled=False))  # scales the loss; for fp16 only
    average: nn.Module | None = None  # the weights' EMA, with --ema-decay
    scores: list[float] = field(default_factory=list)  # of each finished epoch with a validation; higher is better
    ends: bool = False  # set by a callback: no further epoch
    num_steps: int = 0  # per epoch
    total_steps: int = 0  # of the whole training
    last_step: int = -1  # the total step at which training stops here: the end of a trial's segment, or of the training
    learning_rate: float = math.nan  # with which the last step was made, in the optimizer's first parameter group
    watch: Stopwatch = field(default_factory=Stopwatch)
    pace: Pace = field(default_factory=Pace)

    @property
    def total_step(self) -> int:
        """Optimizer steps done in all epochs."""
        return min(self.epoch * self.num_steps + self.step, self.total_steps)  # the last epoch may be shorter

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of the current epoch: with ``--num-steps``, the last one may have fewer."""
        return min(self.num_steps, self.total_steps - self.epoch * self.num_steps)

    def finish_epoch(self) -> None:
        """Begin the next epoch: its sums and its time are 0."""
        self.finished_s += self.epoch_s
        self.epoch += 1
        self.step, self.sums, self.epoch_s = 0, MetricSums(), 0.0

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds only some rows of the tensors: ``--strategy fsdp``."""
        return any(is_sharded(parameter) for parameter in self.model.parameters())

    @property
    def result(self) -> nn.Module:
        """The model that is evaluated and kept: the trained model, or its EMA."""
        return self.model if self.average is None else self.average


@torch.no_grad()
def move_average(state: TrainingState, decay: float) -> None:
    """Move the EMA towards the weights; copy buffers and whole numbers. ``AveragedModel`` would wait for the GPU."""
    assert state.average is not None
    moved, copied = list[tuple[Tensor, Tensor]](), [*zip(state.average.buffers(), state.model.buffers(), strict=True)]
    both = (map(rows_here, model.parameters()) for model in (state.average, state.model))
    for pair in zip(*both, strict=True):
        (moved if pair[0].is_floating_point() or pair[0].is_complex() else copied).append(pair)
    is_first = state.epoch == state.step == 0
    get_ema_multi_avg_fn(0.0 if is_first else decay)(*map(list, zip(*moved, strict=True)), 0)  # type: ignore[no-untyped-call]
    for own, value in copied:
        own.copy_(value)


def is_over(state: TrainingState, config: TrainConfig) -> bool:
    """Tell whether training ends here: after the last epoch, by early stopping, or by a callback."""
    scores, patience = state.scores, config.early_stop
    has_stalled = bool(scores) and patience is not None and len(scores) - best_epoch(scores) >= patience
    return state.epoch >= config.num_epochs or has_stalled or state.ends


def best_epoch(scores: Sequence[float]) -> int:
    """Return the epoch with the best score, counted from 1; of equal scores, the first."""
    return scores.index(max(scores)) + 1


def check_kept(values: object) -> None:
    """Raise torch's error if a checkpoint cannot hold these values, since it is read with ``weights_only``."""
    saved = io.BytesIO()
    torch.save(values, saved)
    torch.load(io.BytesIO(saved.getvalue()), weights_only=True)


def state_of(callback: Callback) -> dict[str, Any]:
    """Return a callback's state for a checkpoint. Raises TrainingStoppedError if a checkpoint cannot hold it."""
    values = callback.state_dict()
    try:
        check_kept(values)
    except Exception as error:  # torch's own message would advise to run code
        code, said = callback.state_dict.__code__, "returns more than numbers, strings, lists, dicts and tensors"
        place = f"{Path(code.co_filename).name}, line {code.co_firstlineno}"
        raise TrainingStoppedError(f"{type(callback).__name__}.state_dict {said} ({place})") from error
    return values


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
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time since the last window, which was spent on saving or between epochs."""
        self._start = time.perf_counter()

    def add(self, sums: dict[str, Tensor], global_size: int) -> None:
        """Add a step: its sums on this rank, one or a row of the chunks', and the size of its global batch."""
        self._sums.append(sums)
        self._sizes.append(global_size)

    def is_full(self, steps_left: int) -> bool:
        """Tell whether to close the window. It stays open if an epoch's last steps are too few for another."""
        return steps_left == 0 or (len(self._sizes) >= self._interval_steps and 2 * steps_left >= self._interval_steps)

    def close(self, state: TrainingState, *, stop_wanted: bool, save_wanted: bool) -> tuple[Progress, bool]:
        """Sum the window over all ranks, add it to ``state``, and empty it.

        Returns the progress, and whether rank 0 wanted to stop; whether it wanted to save is in the progress. Raises
        TrainingDivergedError.
        """
        state.watch.turn(WORKERS)
        names = list(self._sums[0])
        sums = torch.stack([step[name] for step in self._sums for name in names]).double()
        if sums.is_cuda:
            torch.cuda.synchronize()  # otherwise unfinished kernels would be timed in the next window
        now = time.perf_counter()
        elapsed_s, self._start = now - self._start, now
        next_interval = max(1, round(len(self._sizes) * _REPORT_INTERVAL_S / max(elapsed_s, 1e-3)))
        of_first = sums.new_tensor([next_interval, stop_wanted, save_wanted, elapsed_s])
        parts = sums.new_zeros(self._group.world_size, len(PARTS))  # each rank fills its row
        parts[self._group.rank] = sums.new_tensor(state.watch.taken())
        if self._group.world_size > 1:
            whole = torch.cat([sums.view(-1), parts.view(-1)])
            dist.all_reduce(whole)
            dist.broadcast(of_first, 0)
            sums, parts = whole[: sums.numel()].view_as(sums), whole[sums.numel() :].view_as(parts)
        if sums.dim() > 1:
            sums = functools.reduce(operator.add, sums.unbind(1))  # chunk by chunk, in double
        next_interval, stop_wanted, save_wanted, elapsed_s = of_first.tolist()
        rows = [dict(zip(names, row, strict=True)) for row in sums.view(-1, len(names)).tolist()]
        state.watch.turn(CALLBACKS)
        steps = [MetricSums(row, size) for row, size in zip(rows, self._sizes, strict=True)]
        window = MetricSums()
        for offset, step in enumerate(steps, start=state.step - len(steps) + 1):
            if not step.weight >= 0:
                found = f"one in step {offset} of epoch {state.epoch + 1} is negative or NaN"
                raise TrainingStoppedError(f"{type(self._workload).__name__}.weights: {found}; leave it out")
            if not math.isfinite(step.sums["loss"]):
                raise TrainingDivergedError(state.epoch + 1, offset)
            window += step
            state.sums += step  # step by step: the bits of the sum must not depend on when windows close
        self._sums, self._sizes = [], []
        self._interval_steps = int(next_interval)
        state.epoch_s += elapsed_s
        progress = Progress(
            epoch=state.epoch + 1,
            step=state.step,
            num_steps=state.epoch_steps,
            losses=[step.sums["loss"] / step.weight if step.weight else math.nan for step in steps],
            window=window.values(self._workload),
            so_far=state.sums.values(self._workload),
            num_examples=state.sums.num_examples,
            epoch_s=state.epoch_s,
            learning_rate=state.learning_rate,
            total_step=state.total_step,
            saves=bool(stop_wanted or save_wanted),
            parts=parts.tolist(),
        )
        return progress, bool(stop_wanted)
