"""Steps of optimizers that compute the gradient several times, such as LBFGS and SAM: ``step`` needs a closure."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from mnist_ray.parallel.group import Group
from mnist_ray.training.metrics import WEIGHT


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
