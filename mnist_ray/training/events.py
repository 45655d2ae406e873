"""What workers and tasks tell the driver while a run goes on. Light: the queue's own process imports it too."""

from __future__ import annotations

from dataclasses import dataclass

from mnist_ray.training.metrics import Progress


@dataclass(frozen=True)
class Started:
    """The workers are there and about to train."""

    num_workers: int
    hosts: tuple[str, ...]
    threads: int
    """Of each worker."""
    device: str
    precision: str
    epoch: int
    """Epochs that were finished before, in an earlier attempt."""
    step: int
    """Steps that were done before, in the current epoch."""
    num_steps: int
    """Steps of an epoch."""
    damaged: tuple[str, ...] = ()
    """Checkpoints that were passed over: cut off, or not what was written."""

    @property
    def total_step(self) -> int:
        """Steps that were done before, in all."""
        return self.epoch * self.num_steps + self.step


@dataclass(frozen=True)
class WorkersLost:
    """Workers have died or failed; those that are left are stopped, and the run goes on from its last checkpoint."""

    reason: str
    """One line."""


@dataclass(frozen=True)
class NodeLeaving:
    """A worker's node is about to be taken away; a checkpoint is being saved before that."""


@dataclass(frozen=True)
class EpochFinished:
    """All ranks have finished an epoch."""

    last: Progress


@dataclass(frozen=True)
class Validated:
    """A task has evaluated an epoch's checkpoint on the held-out images."""

    epoch: int
    """Counted from 1."""
    loss: float
    accuracy: float
    seconds: float


Event = Started | WorkersLost | NodeLeaving | Progress | EpochFinished | Validated
