"""Metrics that travel as sums and counts and are divided last, so that every image weighs the same."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class MetricSums:
    """Sums over some images, of all ranks."""

    loss_sum: float = 0.0
    num_correct: int = 0
    num_images: int = 0

    def __add__(self, other: MetricSums) -> MetricSums:
        return MetricSums(
            self.loss_sum + other.loss_sum,
            self.num_correct + other.num_correct,
            self.num_images + other.num_images,
        )

    @property
    def loss(self) -> float:
        """Mean loss of an image; NaN over none."""
        return self.loss_sum / self.num_images if self.num_images else math.nan

    @property
    def accuracy(self) -> float:
        """Fraction of images that were right; NaN over none."""
        return self.num_correct / self.num_images if self.num_images else math.nan


@dataclass(frozen=True)
class Progress:
    """Where an epoch stands, over all ranks."""

    epoch: int
    """Counted from 1."""
    step: int
    num_steps: int
    losses: list[float]
    """Mean loss of each step since the last progress."""
    window: MetricSums
    """Over the steps since the last progress."""
    sums: MetricSums
    """Over the epoch so far."""
    epoch_s: float
    """Seconds of training in the epoch so far."""

    @property
    def total_step(self) -> int:
        """Steps done in all, over the epochs."""
        return (self.epoch - 1) * self.num_steps + self.step

    @property
    def loss(self) -> float:
        """Mean loss of the steps since the last progress: the notebook's running loss."""
        return math.fsum(self.losses) / len(self.losses)

    @property
    def images_per_s(self) -> float:
        """Over all ranks, in the epoch so far."""
        return self.sums.num_images / self.epoch_s


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a set of images."""

    batch_loss_sums: tuple[float, ...]
    """Sum of losses of each batch, in the images' order."""
    confusion: np.ndarray
    """(classes, classes) counts: row is the label, column the prediction."""
    predictions: np.ndarray
    """(N,) uint8, in the images' order."""
    probabilities: np.ndarray
    """(N,) float32: how sure the model was of each prediction."""

    @classmethod
    def merge(cls, parts: Iterable[Evaluation]) -> Evaluation:
        """Join evaluations of consecutive parts of a set, given in order."""
        parts = list(parts)
        return cls(
            tuple(loss for part in parts for loss in part.batch_loss_sums),
            np.sum([part.confusion for part in parts], axis=0),
            np.concatenate([part.predictions for part in parts]),
            np.concatenate([part.probabilities for part in parts]),
        )

    @property
    def num_images(self) -> int:
        """Images that were evaluated."""
        return int(self.confusion.sum())

    @property
    def loss(self) -> float:
        """Mean loss of an image; ``fsum`` makes it the same however the batches were spread over tasks."""
        return math.fsum(self.batch_loss_sums) / self.num_images

    @property
    def accuracy(self) -> float:
        """Fraction of images that were right."""
        return float(np.trace(self.confusion)) / self.num_images

    @property
    def accuracy_per_class(self) -> list[float]:
        """Fraction of each class's images that were right; NaN for a class without images."""
        sizes = self.confusion.sum(axis=1)
        return [
            float(right) / int(size) if size else math.nan
            for right, size in zip(np.diag(self.confusion), sizes, strict=True)
        ]

    def to_dict(self, prefix: str) -> dict[str, Any]:
        """Return JSON-ready figures, each key but the confusion matrix's starting with ``prefix``."""
        return {
            f"{prefix}_accuracy": self.accuracy,
            f"{prefix}_loss": self.loss,
            f"{prefix}_accuracy_per_class": [None if math.isnan(a) else a for a in self.accuracy_per_class],
            f"num_{prefix}_images": self.num_images,
            "confusion_matrix": self.confusion.tolist(),
        }
