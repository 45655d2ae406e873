"""The state that training changes, and the process's place among those that train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from mnist_ray.config import TrainConfig
from mnist_ray.training.metrics import MetricSums


class TrainingDivergedError(Exception):
    """The loss or weights are not finite. Raised on every rank alike."""

    def __init__(self, epoch: int, step: int) -> None:
        super().__init__(epoch, step)
        self.epoch = epoch
        self.step = step

    def __str__(self) -> str:
        return f"loss or weights are not finite at step {self.step} of epoch {self.epoch}; try a lower --learning-rate"


class CodeFailedError(Exception):
    """The code of the training has failed on a worker, a model's for instance, and would again."""


class StopWantedError(Exception):
    """Training has stopped because it was asked to, with a checkpoint saved. Raised on every rank alike."""


@dataclass(frozen=True)
class Group:
    """This process among those that train together; ``torch.distributed`` joins them."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass
class TrainingState:
    """All that training changes; a checkpoint holds it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    epoch: int = 0  # epochs finished
    step: int = 0  # optimizer steps done in the current epoch
    sums: MetricSums = field(default_factory=MetricSums)  # over the current epoch so far and all ranks
    epoch_s: float = 0.0
    """Seconds of training in the current epoch so far, without validation and checkpoints, by rank 0's clock."""
    finished_s: float = 0.0  # seconds spent so in the epochs before
    scaler: GradScaler = field(default_factory=lambda: GradScaler(enabled=False))
    """Scales the loss, so that fp16 can hold its gradients; disabled for other precisions."""
    average: AveragedModel | None = None  # moving average of the weights, with --ema-decay
    scores: list[float] = field(default_factory=list)
    """Of each finished epoch's validation, if the training waits for it; more is better."""
    ends: bool = False  # whether a callback has ended the training, with the epochs that are finished
    num_steps: int = 0  # of each epoch

    @property
    def result(self) -> nn.Module:
        """The model that is evaluated and kept: the trained one, or its average."""
        if self.average is None:
            return self.model
        averaged: nn.Module = self.average.module
        return averaged


def is_over(state: TrainingState, config: TrainConfig) -> bool:
    """Tell whether all epochs are trained, or no more are wanted: validation has not been better for long enough."""
    scores, patience = state.scores, config.early_stop
    has_stalled = bool(scores) and patience is not None and len(scores) - best_epoch(scores) >= patience
    return state.epoch >= config.num_epochs or has_stalled or state.ends


def best_epoch(scores: Sequence[float]) -> int:
    """Return which epoch, counted from 1, has the best score, of several the first."""
    return scores.index(max(scores)) + 1
