"""The state that training changes, and this process's rank."""

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


class CodeFailedError(Exception):
    """The training's code, such as the model's, failed on a worker; a retry would fail too."""


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
    """Everything that training changes and a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    epoch: int = 0  # finished epochs
    step: int = 0  # optimizer steps done in the current epoch
    sums: MetricSums = field(default_factory=MetricSums)  # over the current epoch so far and all ranks
    epoch_s: float = 0.0  # seconds of training in the current epoch: by rank 0's clock, without validating and saving
    finished_s: float = 0.0  # seconds of training in the finished epochs
    scaler: GradScaler = field(default_factory=lambda: GradScaler(enabled=False))  # scales the loss; for fp16 only
    average: AveragedModel | None = None  # the weights' EMA, with --ema-decay
    scores: list[float] = field(default_factory=list)  # of each finished epoch, if workers validate; higher is better
    ends: bool = False  # set by a callback: no further epoch
    num_steps: int = 0  # per epoch

    @property
    def result(self) -> nn.Module:
        """The model that is evaluated and kept: the trained model, or its EMA."""
        if self.average is None:
            return self.model
        averaged: nn.Module = self.average.module
        return averaged


def is_over(state: TrainingState, config: TrainConfig) -> bool:
    """Tell whether training ends here: after the last epoch, by early stopping, or by a callback."""
    scores, patience = state.scores, config.early_stop
    has_stalled = bool(scores) and patience is not None and len(scores) - best_epoch(scores) >= patience
    return state.epoch >= config.num_epochs or has_stalled or state.ends


def best_epoch(scores: Sequence[float]) -> int:
    """Return the epoch with the best score, counted from 1; of equal scores, the first."""
    return scores.index(max(scores)) + 1
