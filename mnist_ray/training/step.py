"""A batch's path through a workload: the same in training, evaluation, prediction and the dry run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mnist_ray.config import Precision
from mnist_ray.data.batches import MicroBatch
from mnist_ray.data.tensors import as_fp32, autocast, detached
from mnist_ray.training.metrics import WEIGHT
from mnist_ray.workload import Classification, Regression, Workload
from mnist_ray.workload.calls import check_numbers


def forward(
    workload: Workload,
    model: nn.Module,
    batch: MicroBatch,
    precision: Precision = "fp32",
    generator: torch.Generator | None = None,
) -> tuple[Any, Any]:
    """Return the model's outputs for a batch on its device, in fp32, and the targets that belong to them.

    ``precision`` is that of the model alone, and must not be ``auto``. ``generator`` is for augmentation in training.
    """
    inputs = workload.prepare(batch.inputs, generator)
    with autocast(model, precision):
        return as_fp32(model(inputs)), batch.targets


def per_example(workload: Workload, method: str, values: Tensor, number: int) -> Tensor:
    """Return what a method has returned. Raises UsageError unless it has one number for each example, (number,)."""
    remedy = "; for examples that do not count, return 0, also from weights()"
    check_numbers(f"{type(workload).__name__}.{method}", values, number, remedy)
    return values


def sums_of(workload: Workload, outputs: Any, targets: Any, loss_sum: Tensor, number: int) -> dict[str, Tensor]:
    """Return a batch's sums of the loss, of the workload's measures and of its example weights, on the device.

    The sum of the example weights is NaN if one of them is negative. Raises UsageError unless each of the ``number``
    examples has its values.
    """
    measured = measured_of(workload, outputs, targets, number)
    return {"loss": loss_sum.detach(), **{name: values.sum() for name, values in measured.items()}}


def measured_of(workload: Workload, outputs: Any, targets: Any, number: int) -> dict[str, Tensor]:
    """Return the workload's measures and, if it has any, the weights of each of the ``number`` examples, (number,).

    A negative weight is NaN. Raises UsageError unless each example has its values.
    """
    measured, example_weights = workload.measure(detached(outputs), targets), workload.weights(targets)
    if example_weights is not None and type(workload).measure in (Classification.measure, Regression.measure):
        measured = {name: values * example_weights for name, values in measured.items()}  # these ignore weights
    measured = {name: per_example(workload, f"measure: {name}", each, number) for name, each in measured.items()}
    if example_weights is not None:
        known = per_example(workload, "weights", example_weights, number)
        measured[WEIGHT] = torch.where(known >= 0, known, math.nan)
    return measured
