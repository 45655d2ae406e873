"""The state that training changes, and its optimizers by name; a single one has the name ""."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mnist_ray.config import TrainConfig
from mnist_ray.data.tensors import is_sharded
from mnist_ray.errors import TrainingStoppedError, UsageError
from mnist_ray.training.metrics import MetricSums
from mnist_ray.training.stopwatch import Stopwatch
from mnist_ray.workload.base import Workload
from mnist_ray.workload.calls import placed


class StopWantedError(Exception):
    """Training has saved a checkpoint and stopped, as requested. Raised on every rank alike."""


@dataclass
class TrainingState:
    """What training changes. A checkpoint holds the fields up to ``read_to``; the others follow from settings, or are
    measurements.

    No generator's state is held: random numbers are seeded anew at each step.
    """

    model: nn.Module
    optimizers: dict[str, Optimizer]  # by name; a single one has the name ""
    schedulers: dict[str, LRScheduler]  # of each optimizer
    epoch: int = 0  # finished epochs
    step: int = 0  # optimizer steps done in the current epoch
    sums: MetricSums = field(default_factory=MetricSums)  # over the current epoch so far and all ranks
    epoch_s: float = 0.0  # seconds of training in the current epoch: by rank 0's clock, without validating and saving
    finished_s: float = 0.0  # seconds of training in the finished epochs
    scaler: GradScaler = field(default_factory=lambda: GradScaler(enabled=False))  # scales the loss; for fp16 only
    average: nn.Module | None = None  # the weights' EMA, with --ema-decay
    scores: list[tuple[float, ...]] = field(default_factory=list)  # of each validation; larger is better
    validated_at: list[float] = field(default_factory=list)  # the epochs of each validation
    bf16_is_slow: bool = False  # --precision auto is fp32
    ends: bool = False  # set by a callback: no further epoch
    read_to: dict[str, Any] | None = None  # of a stream: where a resumed run may go on reading
    steps_per_epoch: int = 0
    total_steps: int = 0  # of the whole training
    last_step: int = -1  # the total step that ends the trial's segment, or the training; the worker sets it
    learning_rate: float = math.nan  # of the last step, in the first parameter group
    logged: dict[str, list[Tensor]] = field(default_factory=dict)  # by ``log`` outside of losses, in this step
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def optimizer(self) -> Optimizer:
        """The only optimizer. Raises TrainingStoppedError if there are several."""
        if len(self.optimizers) > 1:
            raise TrainingStoppedError("the run has several optimizers; choose one of state.optimizers by its name")
        return next(iter(self.optimizers.values()))

    def log(self, name: str, value: Tensor | float) -> None:
        """Log a number of this rank; its mean since the last report, and over the epoch, appears by its name.

        Call it at the same steps on all ranks.
        """
        self.logged.setdefault(name, []).append(torch.as_tensor(value).detach())

    @property
    def total_step(self) -> int:
        """Optimizer steps done in all epochs."""
        return min(self.epoch * self.steps_per_epoch + self.step, self.total_steps)  # the last epoch may be shorter

    @property
    def epochs(self) -> float:
        """Epochs trained; within an epoch not a whole number."""
        return self.epoch + self.step / self.steps_per_epoch

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of the current epoch: with ``--num-steps``, the last one may have fewer."""
        return min(self.steps_per_epoch, self.total_steps - self.epoch * self.steps_per_epoch)

    def finish_epoch(self) -> None:
        """Begin the next epoch: reset its sums and its time."""
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


def is_over(state: TrainingState, config: TrainConfig) -> bool:
    """Return whether training ends here: after the last epoch, by early stopping, or by a callback."""
    return state.epoch >= config.num_epochs or state.ends or has_stalled(state, config)


def has_stalled(state: TrainingState, config: TrainConfig) -> bool:
    """Return whether early stopping ends the training: too many validations in a row were no better than the best."""
    scores, patience = state.scores, config.early_stopping_patience
    return bool(scores) and patience is not None and len(scores) - scores.index(max(scores)) > patience


def is_validation_due(state: TrainingState, config: TrainConfig) -> bool:
    """Return whether a validation is due: at an epoch's end and, within a pass, every ``validate_every`` steps."""
    every = config.validate_every if config.num_steps is None else None
    return state.step == 0 or (every is not None and state.step % every == 0)


def create_optimizers(
    workload: Workload, model: nn.Module, config: TrainConfig, total_steps: int
) -> tuple[dict[str, Optimizer], dict[str, LRScheduler]]:
    """Return what ``create_optimizer`` returns, and a schedule for each. Raises UsageError."""
    name = type(workload).__name__
    with placed(workload, "create_optimizer"):
        created = workload.create_optimizer(model, config)
    optimizers: dict[str, Any] = dict(created) if isinstance(created, Mapping) and created else {"": created}
    for optimizer in optimizers.values():
        if not isinstance(optimizer, Optimizer):
            found = f"{name}.create_optimizer must return a torch.optim.Optimizer, or a dict of them by name"
            raise UsageError(f"{found}, not {type(optimizer).__name__}")
    if odd := [key for key in optimizers if key and not str(key).isidentifier()]:
        raise UsageError(f"{name}.create_optimizer: choose a name like a variable's for the optimizer {odd[0]!r}")
    parameters = [parameter for optimizer in optimizers.values() for parameter in parameters_of(optimizer)]
    if len({*parameters}) < len(parameters):
        raise UsageError(f"{name}.create_optimizer: two optimizers have the same parameter; give each its own")
    with placed(workload, "create_scheduler"):
        schedulers = {key: workload.create_scheduler(each, config, total_steps) for key, each in optimizers.items()}
    return optimizers, schedulers


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
