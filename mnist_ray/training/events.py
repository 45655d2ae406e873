"""Events that workers and tasks report during a run. The module is light: the event queue's process imports it too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mnist_ray.training.stopwatch import PARTS
from mnist_ray.workload.figures import RATE, Figure

TIMES = tuple(Figure(f"{part}_s", ("step",), "sum", ".1f") for part in PARTS)
"""Columns of steps.csv: mean seconds of a rank since the last progress."""


@dataclass(frozen=True)
class Event:
    """Something that happened in a run."""


@dataclass(frozen=True)
class ControllerAlive(Event):
    """The process of Ray Train's controller, which starts and watches the workers, is alive."""

    controller: Any  # its actor


@dataclass(frozen=True)
class Started(Event):
    """All workers are set up and start to train."""

    num_workers: int
    hosts: tuple[str, ...]
    threads: int  # of each worker
    device: str
    precision: str
    epoch: int  # finished epochs at this start
    step: int  # finished steps of the current epoch at this start
    total_step: int  # finished steps over all epochs at this start
    epochs: float  # trained at this start
    damaged: tuple[str, ...] = ()  # checkpoints that were skipped
    processor: str = ""  # the model of the first worker's processor or GPU


@dataclass(frozen=True)
class Note(Event):
    """Something that the user should know."""

    text: str  # one line


STOPPING = Note("interrupted: saving a checkpoint (Ctrl-C again to stop at once)")


@dataclass(frozen=True)
class WorkersLost(Event):
    """Workers died or failed; Ray stops the others and resumes from the last checkpoint."""

    reason: str  # one line


@dataclass(frozen=True)
class Progress(Event):
    """The state of the current epoch, over all ranks."""

    epoch: int  # counted from 1
    step: int
    epoch_steps: int  # of this epoch: with --num-steps, the last one may have fewer
    losses: list[float]  # mean loss of each step since the last progress; NaN if its batch had no weight
    window: Mapping[str, float]  # loss and metrics over the steps since the last progress
    so_far: Mapping[str, float]  # loss and metrics over the epoch so far
    num_examples: int  # of the epoch so far
    epoch_s: float  # seconds of training in the epoch so far
    learning_rate: float  # of the last step, in the optimizer's first parameter group
    total_step: int  # finished steps over all epochs
    saves: bool = False  # whether a checkpoint follows
    stops: bool = False  # whether the training stops after that
    parts: Sequence[Sequence[float]] = ()  # of a run's ranks: seconds since the last progress, by stopwatch.PARTS
    others: Mapping[str, float] = field(default_factory=dict)  # what these steps logged, and figures that are no means
    logged: Mapping[str, float] = field(default_factory=dict)  # what the epoch has logged so far

    @property
    def loss(self) -> float:
        """Mean loss of the steps since the last progress, except those without weight."""
        known = [loss for loss in self.losses if not math.isnan(loss)]
        return math.fsum(known) / len(known) if known else math.nan

    @property
    def shares(self) -> dict[str, float]:
        """The fraction of the ranks' time since the last progress that each part took, without those that took none."""
        seconds = seconds_of(self)
        total = math.fsum(seconds.values())
        return {part: seconds[f"{part}_s"] / total for part in PARTS if seconds.get(f"{part}_s")}

    @property
    def examples_per_s(self) -> float:
        """Examples per second over all ranks, in the epoch so far."""
        return self.num_examples / self.epoch_s


@dataclass(frozen=True)
class Saved(Event):
    """All ranks have handed over a checkpoint, at an epoch's end or after a validation."""

    epoch: int  # counted from 1
    metrics: Mapping[str, Any]  # of the checkpoint, as state.json has them
    parts: Sequence[Sequence[float]] = ()  # of a run's ranks: seconds since the last progress, by stopwatch.PARTS


@dataclass(frozen=True)
class EpochFinished(Event):
    """All ranks have finished an epoch."""

    last: Progress


@dataclass(frozen=True)
class Validated(Event):
    """The workers have evaluated the model on the validation split."""

    epoch: float  # counted from 1; within an epoch not a whole number
    values: Mapping[str, float]  # loss and metrics
    seconds: float
    total_step: int  # finished steps over all epochs
    others: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # loss and metrics on further sets, by set


@dataclass(frozen=True)
class Outcome(Event):
    """The training has ended; no other event of the workers follows."""

    diverged: Exception | None = None  # a TrainingDivergedError
    is_stopped: bool = False  # as requested, before its last epoch


def seconds_of(event: Progress | Saved) -> dict[str, float]:
    """Return the seconds since the last progress, by the names of ``TIMES``: means over the ranks. May be empty."""
    means = [math.fsum(of_ranks) / len(event.parts) for of_ranks in zip(*event.parts, strict=True)]
    return {figure.name: round(mean, 4) for figure, mean in zip(TIMES, means, strict=False)}


def figures_of(event: Progress | EpochFinished | Validated) -> dict[str, float]:
    """Return the figures that an event reports, by name."""
    match event:
        case Progress():
            split, values, others = "train", event.window, {"learning_rate": event.learning_rate, **event.others}
        case EpochFinished(last):
            split, values = "train", last.so_far
            others = {RATE: last.examples_per_s, "epoch_s": last.epoch_s, **last.logged}
        case Validated():
            split, values, others = "val", event.values, {"val_s": event.seconds}
            for name, of_set in event.others.items():
                others |= {f"val_{name}_{metric}": value for metric, value in of_set.items()}
    return {**{f"{split}_{name}": value for name, value in values.items()}, **others}
