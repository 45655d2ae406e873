"""Several optimizers, each for its part of the model, as one: ``create_optimizer`` returns a dict of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mnist_ray.errors import TrainingStoppedError, UsageError


class Parts(Optimizer):
    """Optimizers that step in turn. ``part`` names the one whose losses the next gradient is of."""

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        self.optimizers, self.part = dict(optimizers), ""
        self.defaults = {}
        numbers = [id(parameter) for group in self.param_groups for parameter in group["params"]]
        if len(set(numbers)) < len(numbers):
            raise UsageError("create_optimizer: two optimizers have the same parameter; give each its own")

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The parameter groups of all optimizers."""
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise TrainingStoppedError: which optimizer should train it?"""
        remedy = "add the parameter group to one of them, state.optimizer.optimizers[name]"
        raise TrainingStoppedError(f"the run has several optimizers; {remedy}")

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of each parameter, of all optimizers."""
        return {key: value for optimizer in self.optimizers.values() for key, value in optimizer.state.items()}

    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        """Let each optimizer step with the gradient of its losses."""
        for part, optimizer in self.optimizers.items():
            self.part = part
            closure()
            optimizer.step()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside the block, which computes a gradient, only the parameters of the current part require one."""
        groups = self.optimizers[self.part].param_groups
        own = {id(parameter) for group in groups for parameter in group["params"] if parameter.requires_grad}
        if not own:
            found = f"all parameters of the optimizer {self.part} are frozen"
            raise TrainingStoppedError(f"{found}; keep some trainable, or set its learning rate to 0")
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        trained = [parameter.requires_grad for parameter in every]
        for parameter in every:
            parameter.requires_grad_(id(parameter) in own)
        try:
            yield
        finally:
            for parameter, is_trained in zip(every, trained, strict=True):
                parameter.requires_grad_(is_trained)

    def state_dict(self) -> dict[str, Any]:
        """Return one dict like that of a single optimizer: its parameters are counted through all parts."""
        whole: dict[str, Any] = {"state": {}, "param_groups": []}
        first = 0
        for saved in (optimizer.state_dict() for optimizer in self.optimizers.values()):
            whole["state"] |= {first + number: values for number, values in saved["state"].items()}
            for group in saved["param_groups"]:
                whole["param_groups"].append({**group, "params": [first + number for number in group["params"]]})
            first += sum(len(group["params"]) for group in saved["param_groups"])
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore all parts."""
        groups, first = iter(state_dict["param_groups"]), 0
        for optimizer in self.optimizers.values():
            own = [next(groups) for _ in optimizer.param_groups]
            number = sum(len(group["params"]) for group in own)
            state = {key - first: value for key, value in state_dict["state"].items() if first <= key < first + number}
            counted = [{**group, "params": [key - first for key in group["params"]]} for group in own]
            optimizer.load_state_dict({"state": state, "param_groups": counted})
            first += number


def names_of_rates(optimizer: Optimizer) -> list[str]:
    """Return the names of the columns with the learning rates of the parameter groups.

    A group may have an entry ``name`` that no other has; otherwise its number is its name.
    """
    names = list[str]()
    for part, each in (optimizer.optimizers if isinstance(optimizer, Parts) else {"": optimizer}).items():
        given = [group.get("name") for group in each.param_groups]
        own = [str(name) if name and given.count(name) == 1 else str(number) for number, name in enumerate(given)]
        names += [".".join(["learning_rate", *filter(None, [part, name])]) for name in own]
    return names


class Schedules(LRScheduler):
    """The schedules of several optimizers as one."""

    def __init__(self, schedules: Mapping[str, LRScheduler]) -> None:
        self.schedules = dict(schedules)

    def step(self, epoch: int | None = None) -> None:
        """Step each."""
        for schedule in self.schedules.values():
            schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each, by the part's name."""
        return {name: schedule.state_dict() for name, schedule in self.schedules.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore each."""
        for name, schedule in self.schedules.items():
            schedule.load_state_dict(state_dict[name])


def add_over_ranks(model: nn.Module) -> None:
    """Add up the gradients over all ranks; a parameter without a gradient on all ranks keeps none.

    DDP cannot: in turn, the parts have other parameters.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    used = gradients[0].new_tensor([float(p.grad is not None) for p in parameters])
    flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), used])
    dist.all_reduce(flat)
    *sums, used = flat.split([*(parameter.numel() for parameter in parameters), len(parameters)])
    for parameter, total, number in zip(parameters, sums, used.tolist(), strict=True):
        parameter.grad = torch.empty_like(parameter).copy_(total.view_as(parameter)) if number else None
