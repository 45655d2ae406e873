"""Metrics travel as sums and counts and are divided last, so that every example weighs the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mnist_ray.workload.base import Workload


@dataclass(frozen=True)
class MetricSums:
    """Sums over some examples, of all ranks."""

    sums: Mapping[str, float] = field(default_factory=dict)
    """Of the loss, as ``loss``, and of the workload's measures."""
    num_examples: int = 0

    def __add__(self, other: MetricSums) -> MetricSums:
        names = self.sums or other.sums
        added = {name: self.sums.get(name, 0.0) + other.sums.get(name, 0.0) for name in names}
        return MetricSums(added, self.num_examples + other.num_examples)

    def values(self, workload: Workload) -> dict[str, float]:
        """Return the mean loss and the workload's metrics; NaN over no examples."""
        if self.num_examples == 0:
            return {metric.name: math.nan for metric in workload.all_metrics}
        means = {name: value / self.num_examples for name, value in self.sums.items()}
        return {"loss": means.pop("loss"), **workload.summarize(means)}


@dataclass(frozen=True)
class Evaluation:
    """A model's results on a set of examples."""

    batch_sums: tuple[dict[str, float], ...]  # sums of each batch, in the examples' order
    num_examples: int
    columns: dict[str, np.ndarray]  # the workload's predictions, (N,) each, in the examples' order

    @classmethod
    def merge(cls, parts: Iterable[Evaluation]) -> Evaluation:
        """Join evaluations of consecutive parts of a set, given in order."""
        parts = list(parts)
        return cls(
            tuple(sums for part in parts for sums in part.batch_sums),
            sum(part.num_examples for part in parts),
            {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns},
        )

    def values(self, workload: Workload) -> dict[str, float]:
        """Return loss and metrics; ``fsum`` makes them the same however the batches were spread over tasks."""
        names = self.batch_sums[0] if self.batch_sums else {}
        sums = {name: math.fsum(batch[name] for batch in self.batch_sums) for name in names}
        return MetricSums(sums, self.num_examples).values(workload)

    def to_dict(self, workload: Workload) -> dict[str, Any]:
        """Return its part of result.json."""
        values = {f"test_{name}": _json(value) for name, value in self.values(workload).items()}
        return {**values, f"num_test_{workload.nouns}": self.num_examples, **workload.details(self.columns)}


def _json(value: float) -> float | None:
    return None if math.isnan(value) else value


def score(workload: Workload, values: Mapping[str, float]) -> float:
    """Return a number that is larger for a better model: by the monitored metric; ties go to the lower loss.

    ``values`` are those of the validation. The loss weighs too little to matter if the monitor differs.
    """
    value = values[workload.monitor.name]
    if math.isnan(value):
        return -math.inf
    signed = value if workload.monitor.mode == "max" else -value
    return signed - 1e-9 * min(values["loss"], 1e3)
