"""Metrics are kept as sums and counts and divided at the end, so that every example has the same weight."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mnist_ray.training.events import Progress
from mnist_ray.workload.base import Workload

if TYPE_CHECKING:
    from mnist_ray.training.state import Group, TrainingState

_FIRST_INTERVAL_STEPS = 10
_REPORT_INTERVAL_S = 0.5


class TrainingDivergedError(Exception):
    """The loss or weights are not finite. Raised on every rank alike."""

    def __str__(self) -> str:
        epoch, step = self.args
        return f"loss or weights are not finite at step {step} of epoch {epoch}; try a lower --learning-rate"


@dataclass(frozen=True)
class MetricSums:
    """Sums over examples of all ranks."""

    sums: Mapping[str, float] = field(default_factory=dict)  # of the loss and of the workload's measures
    num_examples: int = 0

    def __add__(self, other: MetricSums) -> MetricSums:
        names = self.sums or other.sums
        added = {name: self.sums.get(name, 0.0) + other.sums.get(name, 0.0) for name in names}
        return MetricSums(added, self.num_examples + other.num_examples)

    def values(self, workload: Workload) -> dict[str, float]:
        """Return the mean loss and the workload's metrics; NaN if there are no examples."""
        if self.num_examples == 0:
            return {metric.name: math.nan for metric in workload.all_metrics}
        means = {name: value / self.num_examples for name, value in self.sums.items()}
        return {"loss": means.pop("loss"), **workload.summarize(means)}


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
        self.stops = False  # whether rank 0 wanted to stop when the last window was closed
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time since the last window, which was spent on saving or between epochs."""
        self._start = time.perf_counter()

    def add(self, sums: dict[str, Tensor], global_size: int) -> None:
        """Add a step: its sums on this rank, and the size of its global batch."""
        self._sums.append(sums)
        self._sizes.append(global_size)

    def is_full(self, steps_left: int) -> bool:
        """Tell whether to close the window. It stays open if an epoch's last steps are too few for another."""
        return steps_left == 0 or (len(self._sizes) >= self._interval_steps and 2 * steps_left >= self._interval_steps)

    def close(self, state: TrainingState, num_steps: int, *, stop_wanted: bool) -> Progress:
        """Sum the window over all ranks, add it to ``state``, and empty it. Raises TrainingDivergedError."""
        names = list(self._sums[0])
        sums = torch.stack([step[name] for step in self._sums for name in names]).double()
        if sums.is_cuda:
            torch.cuda.synchronize()  # otherwise unfinished kernels would be timed in the next window
        now = time.perf_counter()
        elapsed_s, self._start = now - self._start, now
        next_interval = max(1, round(len(self._sizes) * _REPORT_INTERVAL_S / max(elapsed_s, 1e-3)))
        agreed = sums.new_tensor([next_interval, stop_wanted, elapsed_s])
        if self._group.world_size > 1:
            dist.all_reduce(sums)
            dist.broadcast(agreed, 0)
        rows = [dict(zip(names, row, strict=True)) for row in sums.view(-1, len(names)).tolist()]
        steps = [MetricSums(row, size) for row, size in zip(rows, self._sizes, strict=True)]
        window = MetricSums()
        for offset, step in enumerate(steps):
            if not math.isfinite(step.sums["loss"]):
                raise TrainingDivergedError(state.epoch + 1, state.step - len(steps) + offset + 1)
            window += step
            state.sums += step  # step by step: the bits of the sum must not depend on when windows close
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


@dataclass(frozen=True)
class Evaluation:
    """A model's results on a set of examples."""

    batch_sums: tuple[dict[str, float], ...]  # of each batch, in the examples' order
    num_examples: int
    columns: dict[str, np.ndarray]  # the workload's predictions, (N,) each, in the examples' order

    @classmethod
    def merge(cls, parts: Iterable[Evaluation]) -> Evaluation:
        """Join evaluations of consecutive parts of a set, given in order."""
        parts = list(parts)
        return cls(
            tuple(sums for part in parts for sums in part.batch_sums),
            sum(part.num_examples for part in parts),
            {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns},
        )

    def values(self, workload: Workload) -> dict[str, float]:
        """Return loss and metrics. Thanks to ``fsum``, they do not depend on the split of batches over tasks."""
        names = self.batch_sums[0] if self.batch_sums else {}
        sums = {name: math.fsum(batch[name] for batch in self.batch_sums) for name in names}
        return MetricSums(sums, self.num_examples).values(workload)

    def to_dict(self, workload: Workload) -> dict[str, Any]:
        """Return the test results for result.json."""
        values = self.values(workload).items()
        tested = {f"test_{name}": None if math.isnan(value) else value for name, value in values}
        return {**tested, f"num_test_{workload.nouns}": self.num_examples, **workload.details(self.columns)}


def score(workload: Workload, values: Mapping[str, float]) -> float:
    """Return a number that is larger for a better model, by the monitored metric and then by the loss.

    ``values`` come from the validation. The weight of the loss is so small that the loss only breaks ties.
    """
    value = values[workload.monitor.name]
    if math.isnan(value):
        return -math.inf
    signed = value if workload.monitor.mode == "max" else -value
    return signed - 1e-9 * min(values["loss"], 1e3)
