"""The optimizer and the schedule that a run's settings name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from mnist_ray.config import OPTIMIZERS, TrainConfig, lr_scales_in, of_torch
from mnist_ray.errors import UsageError, first_line
from mnist_ray.text import did_you_mean


def optimizer_of(config: TrainConfig, model: nn.Module, *, may_lack_gradients: bool) -> Optimizer:
    """Return the optimizer of all parameters. Raises UsageError if ``optimizer`` or ``lr_scales`` do not fit.

    ``may_lack_gradients``: a step may leave parameters without a gradient.
    """
    fused = all(parameter.is_floating_point() for parameter in model.parameters()) or None  # None: PyTorch chooses
    if config.optimizer == "sgd":
        # Fused SGD fails if only some parameters have a momentum yet, and never initializes it if fp16's loss scale
        # skips the first step. PyTorch has none for sharded parameters.
        is_plain = not may_lack_gradients and config.precision != "fp16" and config.strategy == "ddp"
        own: dict[str, Any] = {"momentum": config.momentum, "fused": fused if is_plain else None}
    elif config.optimizer in OPTIMIZERS:
        own = {"betas": (config.beta1, config.beta2), "fused": fused}
    else:
        own = {}
    usual = {"lr": config.learning_rate, "weight_decay": config.weight_decay, **own}
    name = OPTIMIZERS.get(config.optimizer, config.optimizer)
    created: Optimizer = _created("--optimizer", name, "torch.optim", _groups(config, model), usual)
    return created


def scheduler_of(config: TrainConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Return the learning rate's schedule. Raises UsageError if ``lr_schedule`` does not fit."""
    peaks: Any = config.learning_rate
    if config.lr_scales:
        peaks = [group["lr"] for group in optimizer.param_groups]
    if config.lr_schedule == "one-cycle":  # https://arxiv.org/abs/1708.07120
        # Betas and momentum stay as configured.
        return lr_scheduler.OneCycleLR(optimizer, peaks, total_steps, cycle_momentum=False)
    if "." in config.lr_schedule:
        usual = {"max_lr": peaks, **dict.fromkeys(("total_steps", "total_iters", "T_max"), total_steps)}
        created: LRScheduler = _created("--lr-schedule", config.lr_schedule, lr_scheduler.__name__, optimizer, usual)
        return created
    warmup = config.warmup_steps

    def part_of_peak(step: int) -> float:  # steps are counted from 0
        left = 1 - max(0, step - warmup) / max(1, total_steps - warmup)
        after = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[config.lr_schedule]
        return min((step + 1) / max(1, warmup), after)

    return lr_scheduler.LambdaLR(optimizer, part_of_peak)


def _groups(config: TrainConfig, model: nn.Module) -> list[Any]:
    """Return the parameters or, with ``lr_scales``, a group for each pattern of their names and one for all others."""
    scales = lr_scales_in(config.lr_scales)
    if not scales:
        return [*model.parameters()]
    named = dict(model.named_parameters())
    groups: dict[str, list[nn.Parameter]] = {pattern: [] for pattern in (*scales, "")}
    for name, parameter in named.items():
        pattern = next((pattern for pattern in scales if fnmatchcase(name, pattern)), "")
        groups[pattern].append(parameter)
    if unmatched := [pattern for pattern in scales if not groups[pattern]]:
        raise UsageError(f"lr_scales: no parameter is called {unmatched[0]}{did_you_mean(unmatched[0], named)}")
    return [
        {"params": parameters, "lr": config.learning_rate * scales.get(pattern, 1.0)}
        for pattern, parameters in groups.items()
        if parameters
    ]


def _created(place: str, text: str, module_name: str, first: Any, usual: Mapping[str, Any]) -> Any:
    """Create what a text such as ``torch.optim.RAdam(eps=1e-6)`` names, with those of the usual arguments it takes."""
    kind, given = of_torch(text, module_name)
    taken = inspect.signature(kind).parameters
    arguments = {key: value for key, value in usual.items() if key in taken}
    try:
        return kind(first, **(arguments | given))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{place} {text}: {first_line(error)}") from error
