"""Metrics are kept as sums and counts and divided at the end, so that every example counts alike, or by its weight."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mnist_ray.data.data import Evaluated, Split
from mnist_ray.errors import TrainingStoppedError, UsageError
from mnist_ray.training.events import TIMES
from mnist_ray.workload.base import Workload


class TrainingDivergedError(TrainingStoppedError):
    """The loss or weights are not finite. Raised on every rank alike."""

    @property
    def text(self) -> str:
        """The message."""
        epoch, step = self.args
        remedy = "lower --learning-rate, scale inputs and targets, or fix the data"
        return f"loss or weights are not finite at step {step} of epoch {epoch}; {remedy}"


WEIGHT = "weight"  # the name of the sum of the examples' weights, beside those of the loss and the measures
LOGGED, COUNT = "logged ", "count "  # begin the names of a logged value's sum and of what it is divided by
MINIMIZED = "minimized_loss"  # the name by which a minimized loss is logged if it is not the reported one


def missing_sum(name: str) -> float:
    """Return the sum of steps without this name: what has not been logged has a count of 0; a measure is unknown."""
    return 0.0 if name.startswith((LOGGED, COUNT)) else math.nan


@dataclass(frozen=True)
class MetricSums:
    """Sums over examples of all ranks."""

    sums: Mapping[str, float] = field(default_factory=dict)  # of the loss, measures, weights, and what was logged
    num_examples: int = 0

    @property
    def weight(self) -> float:
        """What the sums are divided by: the examples' weights, or their number if all count alike."""
        return self.sums.get(WEIGHT, self.num_examples)

    def plus(self, steps: Mapping[str, np.ndarray], num_examples: int) -> MetricSums:
        """Add the sums of steps, (steps,) by name, one by one: the bits do not depend on how many come at a time.

        A sum becomes NaN if the examples so far were counted before the workload had this measure, or the reverse.
        """
        added = {name: total + missing_sum(name) for name, total in self.sums.items()}
        for name, values in steps.items():
            missing = missing_sum(name) if self.num_examples else 0.0
            added[name] = float(np.add.accumulate(np.append(self.sums.get(name, missing), values))[-1])
        return MetricSums(added, self.num_examples + num_examples)

    def values(self, workload: Workload) -> dict[str, float]:
        """Return the mean loss and the metrics that need no more than means; NaN if there are no examples."""
        if not self.weight > 0:
            return {metric.name: math.nan for metric in workload.all_metrics}
        means = {
            name: value / self.weight
            for name, value in self.sums.items()
            if name != WEIGHT and not name.startswith((LOGGED, COUNT))
        }
        loss = means.pop("loss")
        metrics = workload.summarize(means) if means else {}  # a step of its own may measure nothing
        return {"loss": loss, **{name: float(value) for name, value in metrics.items()}}

    @property
    def logged(self) -> dict[str, float]:
        """The means of what was logged, by name; NaN for what has only weights of 0."""
        names = [name.removeprefix(LOGGED) for name in self.sums if name.startswith(LOGGED)]
        counts = {name: self.sums[COUNT + name] or math.nan for name in names}
        return {name: self.sums[LOGGED + name] / counts[name] for name in names}


@dataclass(frozen=True)
class Evaluation:
    """A model's results on a set of examples."""

    batch_sums: tuple[dict[str, float], ...]  # of each batch, in the examples' order
    num_examples: int
    columns: dict[str, np.ndarray]  # the workload's predictions, (N, ...) each, in the examples' order
    losses: dict[str, np.ndarray] = field(default_factory=dict)  # each example's loss and, if it has one, weight, (N,)

    @classmethod
    def merge(cls, parts: Iterable[Evaluation]) -> Evaluation:
        """Join evaluations of consecutive parts of a set, given in order."""
        parts = list(parts)
        check_columns([part.columns for part in parts])
        return cls(
            tuple(sums for part in parts for sums in part.batch_sums),
            sum(part.num_examples for part in parts),
            {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns},
            {name: np.concatenate([part.losses[name] for part in parts]) for name in parts[0].losses},
        )

    def values(self, workload: Workload) -> dict[str, float]:
        """Return loss and metrics. Thanks to ``fsum``, they do not depend on how ranks or tasks share the batches."""
        names = self.batch_sums[0] if self.batch_sums else {}
        sums = {name: math.fsum(batch[name] for batch in self.batch_sums) for name in names}
        values = MetricSums(sums, self.num_examples).values(workload)
        try:
            of_all = workload.summarize_predictions(self.columns) if self.num_examples else {}
        except ValueError:  # scikit-learn's metrics reject NaN
            if all(np.isfinite(losses).all() for losses in self.losses.values()):
                raise
            of_all = {metric.name: math.nan for metric in workload.metrics if metric.name not in values}
        return values | {name: float(value) for name, value in of_all.items()}  # they may be NumPy's

    def notes(self, split: Split, nouns: str) -> list[str]:
        """Return a line about the examples of the ``split`` whose loss is not finite, if there are any."""
        positions = np.flatnonzero(~np.isfinite(self.losses.get("loss", np.zeros(0))))
        if len(positions) == 0:
            return []
        which = f"the first has index {split.all_indices[positions[0]]} in {split.origin}"
        return [f"the loss is NaN or infinite for {len(positions):,} of {len(split):,} {nouns}; {which}"]

    def to_dict(self, workload: Workload, evaluated: Evaluated = "test") -> dict[str, Any]:
        """Return the results on a set for result.json."""
        values = {f"{evaluated}_{name}": value for name, value in self.values(workload).items()}
        about = {"evaluated": evaluated, f"num_{evaluated}_examples": self.num_examples}
        return {**about, **values, **workload.details(self.columns)}


def check_logged(workload: Workload, names: Iterable[str]) -> None:
    """Raise UsageError if a value is logged by a name that has another meaning in a run's tables."""
    taken = {"step", "epoch", "weight", *(figure.name for figure in (*workload.all_figures, *TIMES))}
    for name in names:
        if name in taken or name.startswith("val_") or not re.fullmatch(r"[A-Za-z_][\w./-]*", name):
            raise UsageError(f"{type(workload).__name__}: {name!r} cannot be logged; choose another name")


def check_columns(batches: Sequence[Mapping[str, Any]]) -> None:
    """Raise UsageError if the columns of predictions differ between batches, so that they cannot be joined."""
    for name in {name: None for columns in batches for name in columns}:
        shapes = {tuple(columns[name].shape[1:]) if name in columns else "none" for columns in batches}
        if len(shapes) > 1:
            found = " and ".join(map(str, sorted(shapes, key=str)))
            raise UsageError(f"predictions: {name} differs in shape between examples, {found}; pad them to one")


def score(workload: Workload, values: Mapping[str, float]) -> tuple[float, float]:
    """Return a pair that is larger for a better model, by the monitored metric and then by the loss; NaN is the worst.

    ``values`` come from the validation.
    """
    value = values[workload.monitor.name]
    pair = value if workload.monitor.mode == "max" else -value, -values["loss"]
    return -math.inf if math.isnan(pair[0]) else pair[0], -math.inf if math.isnan(pair[1]) else pair[1]
