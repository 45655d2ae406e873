"""Events that workers and tasks report during a run. Light: the event queue's process imports it too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ControllerStarted:
    """Ray Train has begun to look after the workers."""

    actor: Any  # the controller; used to check that it is alive


@dataclass(frozen=True)
class Started:
    """The workers are there and about to train."""

    num_workers: int
    hosts: tuple[str, ...]
    threads: int  # of each worker
    device: str
    precision: str
    epoch: int  # epochs that were finished before, in an earlier attempt
    step: int  # steps that were done before, in the current epoch
    num_steps: int  # steps of an epoch
    damaged: tuple[str, ...] = ()  # checkpoints that were passed over
    notes: tuple[str, ...] = ()  # printed for the user

    @property
    def total_step(self) -> int:
        """Steps that were done before, in all."""
        return self.epoch * self.num_steps + self.step


@dataclass(frozen=True)
class WorkersLost:
    """Workers have died or failed; those that are left are stopped, and the run goes on from its last checkpoint."""

    reason: str  # one line


@dataclass(frozen=True)
class NodeLeaving:
    """A worker's node is about to be taken away; a checkpoint is being saved before that."""


@dataclass(frozen=True)
class Stopping:
    """The user has asked for the end; a checkpoint is being saved before that."""


@dataclass(frozen=True)
class Progress:
    """Where an epoch stands, over all ranks."""

    epoch: int  # counted from 1
    step: int
    num_steps: int
    losses: list[float]  # mean loss of each step since the last progress
    window: Mapping[str, float]  # loss and metrics over the steps since the last progress
    so_far: Mapping[str, float]  # loss and metrics over the epoch so far
    num_examples: int  # of the epoch so far
    epoch_s: float  # seconds of training in the epoch so far

    @property
    def total_step(self) -> int:
        """Steps done in all, over the epochs."""
        return (self.epoch - 1) * self.num_steps + self.step

    @property
    def loss(self) -> float:
        """Mean loss of the steps since the last progress: the notebook's running loss."""
        return math.fsum(self.losses) / len(self.losses)

    @property
    def examples_per_s(self) -> float:
        """Over all ranks, in the epoch so far."""
        return self.num_examples / self.epoch_s


@dataclass(frozen=True)
class EpochFinished:
    """All ranks have finished an epoch."""

    last: Progress


@dataclass(frozen=True)
class Validated:
    """An epoch's checkpoint was evaluated on the validation set, by a task or by the workers."""

    epoch: int  # counted from 1
    values: Mapping[str, float]  # loss and metrics
    seconds: float
    is_beside: bool = True  # whether the training went on meanwhile


@dataclass(frozen=True)
class StoppedEarly:
    """The training is over before its last epoch, since validation has not been better for long enough."""

    epoch: int  # the last, counted from 1
    best_epoch: int


@dataclass(frozen=True)
class TrialEnded:
    """A trial of a sweep has ended."""

    number: int  # counted from 1
    settings: Mapping[str, Any]  # those that are searched, and the seed
    state: str
    has_failed: bool
    values: Mapping[str, float]  # its figures in sweep.csv, as far as there are any


Event = (
    ControllerStarted
    | Started
    | WorkersLost
    | NodeLeaving
    | Stopping
    | Progress
    | EpochFinished
    | Validated
    | StoppedEarly
    | TrialEnded
)
