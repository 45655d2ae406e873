"""Tries what only some workloads have before a run: callbacks, ``augment``, the losses of several optimizers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import MicroBatch
from mnist_ray.data.tensors import as_fp32, autocast
from mnist_ray.errors import UsageError
from mnist_ray.parallel.group import Group, resolve_precision
from mnist_ray.training.callback import Callback
from mnist_ray.training.open_step import prepared
from mnist_ray.training.parts import Parts, Schedules
from mnist_ray.workload.base import Workload
from mnist_ray.workload.calls import check_numbers, placed
from mnist_ray.workload.classification import Classification
from mnist_ray.workload.user_code import check_members


def check_callbacks(workload: Workload) -> None:
    """Raise UsageError unless the workload's own callbacks are objects whose methods can be called."""
    with placed(workload, "callbacks"):
        found = copy.deepcopy([*workload.callbacks])
    for callback in found:
        if not isinstance(callback, Callback):
            raise UsageError(f"{type(workload).__name__}.callbacks must hold Callback objects, not {callback!r:.40}")
        check_members(type(callback), Callback)


def loss_of_augmented(workload: Workload, model: nn.Module, batch: MicroBatch, config: TrainConfig) -> Tensor:
    """Return the loss to minimize after the workload's ``augment``, (N,). Raises UsageError."""
    generator, name = torch.default_generator, type(workload).__name__
    with placed(workload, "augment"):
        changed = prepared(workload, batch, generator)
    if not isinstance(changed, tuple) or len(changed) != 2:
        raise UsageError(f"{name}.augment must return inputs and targets, not {type(changed).__name__}")
    inputs, targets = changed
    with placed(workload, "the loss of what augment returns"):
        with autocast(model, resolve_precision(config.precision, Group())):
            outputs = as_fp32(model(inputs))
        minimized = workload.training_loss(outputs, targets, config)
        losses = workload.loss(outputs, targets) if minimized is None else minimized
    check_numbers(f"{name}: the loss of what augment returns", losses, batch.num_examples)
    return losses


def check_created(created: object, name: str) -> None:
    """Raise UsageError unless ``create_optimizer`` has returned an optimizer, or several by name."""
    several = created.values() if isinstance(created, Mapping) and created else [created]
    for optimizer in several:
        if not isinstance(optimizer, Optimizer):
            found = f"{name}.create_optimizer must return a torch.optim.Optimizer, or a dict of them by name"
            raise UsageError(f"{found}, not {type(optimizer).__name__}")


def check_parts(workload: Workload, model: nn.Module, batch: MicroBatch, optimizer: Parts, config: TrainConfig) -> None:
    """Compute the losses of each optimizer's part. Raises UsageError."""
    name = type(workload).__name__
    if workload.compares_examples:
        raise UsageError(f"{name}: compares_examples does not work with several optimizers")
    if type(workload).training_loss not in (Workload.training_loss, Classification.training_loss):
        raise UsageError(f"{name}.training_loss has no effect with several optimizers, which minimize losses")
    model.train()
    generator = torch.default_generator
    for part, own in optimizer.optimizers.items():
        model.zero_grad()
        with placed(workload, f"losses of {part}"):
            inputs, targets = prepared(workload, batch, generator)
            with autocast(model, resolve_precision(config.precision, Group())):
                losses = workload.losses(model, inputs, targets, part)
        check_numbers(f"{name}.losses of {part}", losses, batch.global_size)
        if not losses.requires_grad:
            raise UsageError(f"{name}.losses of {part} does not depend on the model's parameters")
        losses.float().sum().backward()  # type: ignore[no-untyped-call]
        trained = {id(parameter) for group in own.param_groups for parameter in group["params"]}
        idle = [key for key, value in model.named_parameters() if id(value) in trained and value.grad is None]
        if idle and not workload.has_unused_parameters:
            raise UsageError(f"{name}: parameter {idle[0]} is not part of the losses of {part}")
    model.zero_grad()


def check_schedule(workload: Workload, scheduler: Any) -> None:
    """Step a schedule. Raises UsageError."""
    of_parts = scheduler.schedules.values() if isinstance(scheduler, Schedules) else ()
    if any(isinstance(schedule, ReduceLROnPlateau) for schedule in of_parts):
        raise UsageError(f"{type(workload).__name__}: ReduceLROnPlateau does not work with several optimizers")
    monitor = workload.monitor
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode != monitor.mode:
        found = f"{type(workload).__name__}: ReduceLROnPlateau has mode={scheduler.mode!r}"
        raise UsageError(f"{found}, but looks at {monitor.name}; create it with mode={monitor.mode!r}")
    with placed(workload, "scheduler.step()"):
        scheduler.step(*([0.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
