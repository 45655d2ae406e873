"""Workloads whose targets are numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mnist_ray.data.data import Split
from mnist_ray.errors import UsageError
from mnist_ray.workload.base import Picture, Workload
from mnist_ray.workload.calls import check_tensors, uses_outputs
from mnist_ray.workload.figures import Metric

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDING = 1e-12  # relative to the targets' mean square; a smaller variance is rounding error


class Regression(Workload):
    """The outputs are numbers, (N,) or (N, 1); the targets are numbers, (N,).

    The loss is the squared error. If the targets are large, scale the loss. If they are far from 0 compared with their
    spread, let the model predict differences from their mean, or use ``--precision fp32``: bf16 has three digits.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (Metric("rmse", "min"), Metric("mae", "min"), Metric("r2", "max"))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the squared error of each example."""
        return (_flat(outputs) - targets.float()).square()

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return squared and absolute errors, targets, and squared targets."""
        error, target = _flat(outputs).double() - targets.double(), targets.double()  # fp32 would round large targets
        return {"squared": error.square(), "absolute": error.abs(), "target": target, "target_squared": target.square()}

    def summarize(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return root mean squared error, mean absolute error, and the explained fraction of the variance."""
        variance = means["target_squared"] - means["target"] ** 2
        return {
            "rmse": math.sqrt(means["squared"]),
            "mae": means["absolute"],
            "r2": 1 - means["squared"] / variance if variance > _ROUNDING * means["target_squared"] else math.nan,
        }

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise UsageError if the shapes do not fit: torch would broadcast (N,) and (N, 1) to (N, N)."""
        name = type(self).__name__
        if not uses_outputs(self, Regression):
            return
        check_tensors(name, outputs, targets)
        if targets.ndim != 1 or tuple(outputs.shape) not in ((len(targets),), (len(targets), 1)):
            shapes = f"{tuple(outputs.shape)} for targets {tuple(targets.shape)}"
            raise UsageError(f"{name}: the model returns {shapes}; both must be one number per example")

    def predictions(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return each example's target and prediction."""
        return {"target": targets, "prediction": _flat(outputs)}

    def top_predictions(self, outputs: Tensor) -> list[list[tuple[Any, float]]]:
        """Return the number predicted for each example; it has no probability."""
        return [[(value, math.nan)] for value in _flat(outputs).tolist()]

    def pictures(
        self, result: Mapping[str, Any], test: Split | None, columns: Mapping[str, np.ndarray]
    ) -> list[Picture]:
        """Plot predictions against targets."""
        from mnist_ray.workload import drawing  # imports matplotlib

        return drawing.of_regression(result, columns)


def _flat(outputs: Tensor) -> Tensor:
    return outputs.reshape(len(outputs))
