"""What a step does for workloads that need more than a loss of each example: off the path of a plain step.

``augment`` changes inputs and targets, ``compares_examples`` lets the loss see the whole global batch, and optimizers
such as LBFGS and SAM compute the gradient several times: their ``step`` needs a closure.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import MicroBatch
from mnist_ray.data.tensors import as_fp32, autocast, map_tensors
from mnist_ray.parallel.group import Group
from mnist_ray.parallel.whole_batch import of_all_ranks
from mnist_ray.training.evaluation import evaluating
from mnist_ray.training.metrics import WEIGHT
from mnist_ray.training.parts import Parts, Schedules
from mnist_ray.training.step import forward, per_example
from mnist_ray.workload import Workload


def with_schedule(
    workload: Workload, created: Any, config: TrainConfig, total_steps: int
) -> tuple[Optimizer, LRScheduler]:
    """Return what ``create_optimizer`` returned and its schedule; several optimizers as one."""
    if isinstance(created, Optimizer):
        return created, workload.create_scheduler(created, config, total_steps)
    schedules = {name: workload.create_scheduler(each, config, total_steps) for name, each in created.items()}
    return Parts(created), Schedules(schedules)


def is_open(workload: Workload) -> bool:
    """Return whether ``forward_open`` computes the workload's losses, not ``forward``."""
    return workload.compares_examples or augments(workload) or type(workload).losses is not Workload.losses


def augments(workload: Workload) -> bool:
    """Return whether the workload has an ``augment`` of its own."""
    return type(workload).augment is not Workload.augment


def forward_open(
    workload: Workload,
    model: nn.Module,
    batch: MicroBatch,
    config: TrainConfig,
    generator: torch.Generator,
    group: Group,
    part: str = "",
) -> tuple[Any, Any, Tensor, Tensor | None]:
    """Return outputs and targets of a micro-batch, the sum of its losses, and that of those to minimize, if others.

    The latter see the targets that ``augment`` returns. Losses that compare examples see those of all ranks, which must
    all call this; each rank takes those of its slice. With several optimizers, those to minimize are of one ``part``.
    """
    if part:
        with evaluating(model):
            copied = map_tensors(torch.clone, batch)  # ``prepare`` may change it in place
            outputs, targets = forward(workload, model, copied, config.precision, generator)
            losses = per_example(workload, "loss", workload.loss(outputs, targets), batch.num_examples)
        inputs, targets = prepared(workload, batch, generator)
        with autocast(model, config.precision):
            of_part = per_example(workload, "losses", workload.losses(model, inputs, targets, part), batch.num_examples)
        return outputs, batch.targets, losses.sum(), of_part.float().sum()
    outputs, learned = _augmented(workload, model, batch, config, generator)
    seen, targets, own = outputs, batch.targets, slice(None)
    if workload.compares_examples and group.world_size > 1:
        together = of_all_ranks(outputs, (targets, learned), group, batch.num_examples, is_filler=batch.is_filler)
        seen, (targets, learned), own = together
    minimized = workload.training_loss(seen, learned, config)
    if minimized is None and learned is not targets:
        minimized = workload.loss(seen, learned)
    losses = workload.loss(seen, targets)
    number = batch.global_size if workload.compares_examples else batch.num_examples
    if minimized is not None:
        minimized = per_example(workload, "loss to minimize", minimized, number)[own].sum()
    return outputs, batch.targets, per_example(workload, "loss", losses, number)[own].sum(), minimized


def _augmented(
    workload: Workload, model: nn.Module, batch: MicroBatch, config: TrainConfig, generator: torch.Generator
) -> tuple[Any, Any]:
    if not augments(workload):
        return forward(workload, model, batch, config.precision, generator)
    inputs, targets = prepared(workload, batch, generator)
    with autocast(model, config.precision):
        return as_fp32(model(inputs)), targets


def prepared(workload: Workload, batch: MicroBatch, generator: torch.Generator) -> tuple[Any, Any]:
    """Return inputs and targets for the loss to minimize. ``augment`` may change them in place."""
    targets = map_tensors(torch.clone, batch.targets)
    return workload.augment(workload.prepare(batch.inputs, generator), targets, generator)


def takes_closure(optimizer: Optimizer) -> bool:
    """Return whether ``optimizer.step`` needs a closure, which computes the gradients and returns the loss."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def step_with_closure(
    optimizer: Optimizer, compute: Callable[[], tuple[dict[str, Tensor], Tensor | None]], global_size: int, group: Group
) -> dict[str, Tensor]:
    """Let an optimizer step, which may call the closure several times; return the sums of its first call.

    ``compute`` puts the gradients of the step's global batch into the model, and returns the sums over this rank's
    slice and, if it differs from the loss, that of the minimized loss. All ranks' closures return the same mean loss.
    """
    first: dict[str, Tensor] = {}

    def closure() -> Tensor:
        sums, minimized = compute()
        first.update({} if first else sums)
        loss = sums["loss"] if minimized is None else minimized
        # With --reproducible, each has a number per chunk, 0 for those of other ranks: they add up in one order.
        pair = torch.stack([loss.double(), sums.get(WEIGHT, torch.zeros_like(loss)).double()])
        if group.world_size > 1:
            dist.all_reduce(pair)
        loss_sum, weight = pair.view(2, -1).sum(1)
        return loss_sum / (weight if WEIGHT in sums else global_size)

    step: Any = optimizer.step
    step(closure)
    return first or compute()[0]
