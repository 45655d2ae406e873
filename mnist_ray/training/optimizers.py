"""The optimizers of a run, by name, and their schedules; a single one has the name ""."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mnist_ray.config import TrainConfig
from mnist_ray.errors import UsageError
from mnist_ray.workload.base import Workload
from mnist_ray.workload.calls import placed


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


def learning_rates(optimizers: Mapping[str, Optimizer]) -> list[float]:
    """Return the learning rate of each parameter group."""
    return [float(group["lr"]) for optimizer in optimizers.values() for group in optimizer.param_groups]


def names_of_rates(optimizers: Mapping[str, Optimizer]) -> list[str]:
    """Return the names of the columns with the learning rates of the parameter groups.

    A group may have an entry ``name`` that no other has; otherwise its number is its name.
    """
    names = list[str]()
    for key, optimizer in optimizers.items():
        given = [group.get("name") for group in optimizer.param_groups]
        own = [str(name) if name and given.count(name) == 1 else str(number) for number, name in enumerate(given)]
        names += [".".join(["learning_rate", *filter(None, [key, name])]) for name in own]
    return names
