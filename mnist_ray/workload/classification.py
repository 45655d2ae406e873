"""Workloads whose targets are classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mnist_ray.errors import UsageError
from mnist_ray.workload.base import Metric, Picture, Rows, Workload
from mnist_ray.workload.data import Arrays, Data, Split

if TYPE_CHECKING:
    from torch import Tensor

    from mnist_ray.config import TrainConfig

_NUM_TOP = 3
_MOST_COLUMNS = 12  # of classes in the console's confusion matrix


class Classification(Workload):
    """A model's outputs are logits (N, classes), targets (N,) whole numbers from 0 on.

    The number of classes comes from the data: ``metadata={"class_names": [...]}``, else the attribute ``classes`` of
    the ``Dataset`` to train on (torchvision's have it), else the largest target.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (Metric("accuracy", "max", is_fraction=True),)
    output_noun = "logits"
    prediction_noun = "class"

    @property
    def class_names(self) -> list[Any]:
        """The names of the classes; numbers if the data have no names."""
        names: list[Any] = self.metadata["class_names"]
        return names

    @property
    def num_classes(self) -> int:
        """How many classes the data have."""
        return len(self.class_names)

    def metadata_of(self, data: Data) -> dict[str, Any]:
        """Return the names of the classes, beside what the data say themselves."""
        return {**data.metadata, "class_names": _class_names(data)}

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy of each example."""
        return _cross_entropy(outputs, targets)

    def training_loss(self, outputs: Tensor, targets: Tensor, config: TrainConfig) -> Tensor | None:
        """Return the cross entropy with smoothed targets (https://arxiv.org/abs/1512.00567) if the flag is given."""
        if not config.label_smoothing or type(self).loss is not Classification.loss:
            return super().training_loss(outputs, targets, config)
        return _cross_entropy(outputs, targets, config.label_smoothing)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return which examples are right."""
        return {"accuracy": outputs.argmax(1) == targets}

    def check_data(self, data: Data) -> None:
        """Compare the targets of arrays, and the classes of a ``Dataset``, with the classes."""
        for split in ("train", "validation", "test"):
            examples, place = getattr(data, split), f"{type(self).__name__}.load_data: {split}"
            if isinstance(examples, Arrays):
                self._check_targets(place, examples.targets)
            elif (classes := list(getattr(examples, "classes", self.class_names))) != self.class_names:
                different = sorted(str(name) for name in {*classes} ^ {*self.class_names})
                named = ", ".join(different) or "their order"
                raise UsageError(f"{place} has other classes than the model: {named}")

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        """Compare logits and targets with the classes."""
        name = type(self).__name__
        if not hasattr(outputs, "ndim"):
            raise UsageError(f"{name}: the model gives a {type(outputs).__name__}, not a tensor of logits")
        if outputs.ndim != 2 or outputs.shape[1] != self.num_classes:
            raise UsageError(
                f"{name}: the model gives {' × '.join(map(str, outputs.shape[1:])) or 'no'} logits per example, "
                f"but the data have {self.num_classes:,} classes"
            )
        self._check_targets(name, targets.numpy())

    def _check_targets(self, place: str, targets: np.ndarray) -> None:
        if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
            raise UsageError(f"{place}: targets are to be whole numbers (N,), not {targets.dtype} {targets.shape}")
        wrong = targets[(targets < 0) | (targets >= self.num_classes)]
        if len(wrong):
            raise UsageError(f"{place} has a target {wrong[0]}, but the classes are 0 to {self.num_classes - 1}")

    def predictions(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return label, prediction and the probability that the model gave it."""
        best = outputs.softmax(1).max(1)
        return {"label": targets, "prediction": best.indices, "probability": best.values}

    def readable(self, columns: Mapping[str, np.ndarray]) -> dict[str, Sequence[Any]]:
        """Return labels and predictions by name."""
        return {
            "label": [self.class_names[label] for label in columns["label"].tolist()],
            "prediction": [self.class_names[prediction] for prediction in columns["prediction"].tolist()],
            "probability": [f"{probability:.6f}" for probability in columns["probability"]],
        }

    def details(self, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return the accuracy of each class (None if it has no examples) and the confusion matrix."""
        counts = confusion(columns, self.num_classes)
        per_class = [None if math.isnan(accuracy) else accuracy for accuracy in accuracy_per_class(counts)]
        return {"test_accuracy_per_class": per_class, "confusion_matrix": counts.tolist()}

    def lines(self, columns: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
        """Return the confusion matrix with each class's accuracy; nothing of more classes than a terminal is wide."""
        if self.num_classes > _MOST_COLUMNS:
            return []
        table = confusion_table(confusion(columns, self.num_classes), self.class_names)
        return [("" if number else "confusion", line) for number, line in enumerate(table)]

    def pictures(self, result: Mapping[str, Any], rows: Rows, test: Split | None) -> list[Picture]:
        """Return the confusion matrix, the accuracy of each class, and examples with their predictions."""
        from mnist_ray.workload import figures  # imports matplotlib

        return figures.of_classification(self, result, rows, test)

    def top_predictions(self, outputs: Tensor) -> list[list[tuple[Any, float]]]:
        """Return the most probable classes of each example."""
        best = outputs.softmax(1).topk(min(_NUM_TOP, outputs.shape[1]))
        return [
            [(self.class_names[index], probability) for index, probability in zip(indices, probabilities, strict=True)]
            for indices, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def _cross_entropy(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    from torch.nn import functional as F

    return F.cross_entropy(outputs, targets.long(), reduction="none", label_smoothing=label_smoothing)


def _class_names(data: Data) -> list[Any]:
    if "class_names" in data.metadata:
        return list(data.metadata["class_names"])
    if hasattr(data.train, "classes"):
        return list(data.train.classes)
    if not isinstance(data.train, Arrays):
        raise UsageError('the Dataset has no classes: return Data(..., metadata={"class_names": [...]}) from load_data')
    splits = [split for split in (data.train, data.validation, data.test) if isinstance(split, Arrays) and len(split)]
    return list(range(1 + max(int(split.targets.max()) for split in splits)))


def confusion(columns: Mapping[str, np.ndarray], num_classes: int) -> np.ndarray:
    """Return (classes, classes) counts: row is the label, column the prediction."""
    labels, predictions = columns["label"].astype(int), columns["prediction"].astype(int)
    return np.bincount(labels * num_classes + predictions, minlength=num_classes**2).reshape(num_classes, num_classes)


def accuracy_per_class(counts: np.ndarray) -> list[float]:
    """Return the fraction of each class's examples that were right; NaN for a class without examples."""
    sizes = counts.sum(axis=1)
    return [float(right) / int(size) if size else math.nan for right, size in zip(np.diag(counts), sizes, strict=True)]


def confusion_table(counts: np.ndarray, names: Sequence[Any]) -> list[str]:
    """Return the confusion matrix as lines: a row per label, a column per prediction, the label's accuracy last."""
    texts = [str(name) for name in names]
    width = max(5, *map(len, texts))
    cell = 1 + max(5, len(str(counts.max())), *map(len, texts))
    lines = ["label".rjust(width) + "".join(f"{name:>{cell}}" for name in texts) + "  accuracy"]
    for name, row, accuracy in zip(texts, counts.tolist(), accuracy_per_class(counts), strict=True):
        cells = "".join(f"{count or '·':>{cell}}" for count in row)
        percent = "-" if math.isnan(accuracy) else f"{accuracy:.2%}"
        lines.append(f"{name:>{width}}{cells}{percent:>10}")
    return lines
