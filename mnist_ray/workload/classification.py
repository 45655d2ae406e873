"""Workloads whose targets are classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mnist_ray.data.data import Arrays, Data, Split
from mnist_ray.errors import ExampleError, UsageError
from mnist_ray.workload.base import Picture, Workload
from mnist_ray.workload.calls import check_tensors, uses_outputs
from mnist_ray.workload.figures import ACCURACY, Metric

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mnist_ray.data.batches import MicroBatch

_IGNORE_NONE = -(2**63)  # PyTorch by default ignores the target -100
_NUM_TOP = 3
_MAX_COLUMNS = 12  # with more classes, the console shows no confusion matrix
_MAX_PROBABILITIES = 1000  # with more classes, predictions have no vectors, which need much memory
_MAX_ROWS = 1000  # with more classes, there is no confusion matrix: its memory grows quadratically


class Classification(Workload):
    """The outputs are logits, (N, classes); the targets are integers from 0 on, (N,).

    The classes come from ``metadata={"class_names": [...]}``. If that is missing, they come from the training
    ``Dataset``'s attribute ``classes``, as in torchvision, or, for arrays, from the largest target.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (ACCURACY,)

    @property
    def class_names(self) -> list[Any]:
        """The names of the classes, or their numbers if the data name no classes."""
        names: list[Any] = self.metadata["class_names"]
        return names

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    def metadata_of(self, data: Data) -> dict[str, Any]:
        """Return the data's metadata with ``class_names`` added."""
        return {**data.metadata, "class_names": _class_names(data)}

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy of each example."""
        return self._cross_entropy(outputs, targets)

    def batch_loss(self, model: nn.Module, batch: MicroBatch, step: Any) -> Tensor:
        """Return the losses to minimize: with ``label_smoothing``, of smoothed targets (arXiv 1512.00567)."""
        smoothing = step.config.label_smoothing
        if not smoothing or type(self).loss is not Classification.loss:
            return super().batch_loss(model, batch, step)
        outputs = step.forward(batch)
        step.measure(outputs, batch.targets)
        with step.in_fp32():
            return self._cross_entropy(outputs, batch.targets, smoothing)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return whether each example's prediction is right."""
        return {"accuracy": outputs.argmax(1) == targets.long()}

    def strata(self, data: Data) -> np.ndarray | None:
        """Return the training targets; of a ``Dataset``, its ``targets``, as in torchvision, if it has any."""
        targets = np.asarray(getattr(data.train, "targets", None))
        return targets if targets.shape == (len(data.train),) else None  # type: ignore[arg-type]

    def check_data(self, data: Data) -> None:
        """Raise UsageError if an array's targets or a ``Dataset``'s classes do not fit the model's classes."""
        for part, examples in data.parts.items():
            where = f"{type(self).__name__}.load_data: {part}"
            if isinstance(examples, Arrays):
                if isinstance(examples.targets, np.ndarray):  # other targets may have any form, with a custom loss
                    self._check_targets(where, examples.targets)
            elif (classes := list(getattr(examples, "classes", self.class_names))) != self.class_names:
                different = sorted(str(name) for name in {*classes} ^ {*self.class_names})
                named = ", ".join(different) or "their order"
                raise UsageError(f"{where} and the model differ in classes: {named}")

    def find_fault(self, examples: Any) -> str:
        """Report a block's first target that is not a class, unless methods of a subclass interpret the targets."""
        is_whole = isinstance(examples, Arrays)
        if not uses_outputs(self, Classification) or not (is_whole or type(self).collate is Workload.collate):
            return ""
        targets = np.asarray(examples.targets if is_whole else [target for _, target in examples])
        return self._wrong_class(targets)

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise UsageError if the logits or the targets do not fit the classes, unless no method here uses them."""
        name = type(self).__name__
        if not uses_outputs(self, Classification):
            return
        check_tensors(name, outputs, targets)
        if outputs.ndim != 2 or outputs.shape[1] != self.num_classes:
            raise UsageError(
                f"{name}: the model returns {' × '.join(map(str, outputs.shape[1:])) or 'no'} logits per example, "
                f"but the data have {self.num_classes:,} classes"
            )
        self._check_targets(name, targets.numpy())

    def _check_targets(self, where: str, targets: np.ndarray) -> None:
        if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
            raise UsageError(f"{where}: targets must be integers (N,), not {targets.dtype} {targets.shape}")
        if fault := self._wrong_class(targets):
            raise UsageError(f"{where} {fault}")

    def _wrong_class(self, targets: np.ndarray) -> str:
        rows = np.flatnonzero((targets < 0) | (targets >= self.num_classes))
        last = self.num_classes - 1
        return f"has target {targets[rows[0]]} in row {rows[0]}, but the classes are 0 to {last}" if len(rows) else ""

    def predictions(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return each example's label, its prediction, that one's probability, and the probabilities of all classes."""
        probabilities = outputs.softmax(1)
        best = probabilities.max(1)
        of_all = {"probabilities": probabilities} if self.num_classes <= _MAX_PROBABILITIES else {}
        return {"label": targets, "prediction": best.indices, "probability": best.values, **of_all}

    def details(self, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return the accuracy per class (None without examples) and the confusion matrix.

        The matrix has a row per label; with very many classes, it is left out. Without a column of labels, there are no
        details.
        """
        if "label" not in columns:
            return {}
        labels, predictions = columns["label"].astype(int), columns["prediction"].astype(int)
        hits = labels[labels == predictions]
        totals, right = (np.bincount(numbers, minlength=self.num_classes).tolist() for numbers in (labels, hits))
        accuracies = [part / total if total else None for part, total in zip(right, totals, strict=True)]
        found: dict[str, Any] = {"accuracy_per_class": accuracies}
        if self.num_classes <= _MAX_ROWS:
            counts = np.zeros((self.num_classes, self.num_classes), int)
            np.add.at(counts, (labels, predictions), 1)
            found["confusion_matrix"] = counts.tolist()
        return found

    def lines(self, columns: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
        """Return the confusion matrix, with a row per label and a column per prediction; [] if it would be too wide."""
        if self.num_classes > _MAX_COLUMNS or "label" not in columns:
            return []
        details, names = Classification.details(self, columns), [str(name) for name in self.class_names]
        counts = details["confusion_matrix"]
        width = max(5, *map(len, names))
        cell = 1 + max(width, *(len(str(count)) for row in counts for count in row))
        lines = [("confusion", "label".rjust(width) + "".join(f"{name:>{cell}}" for name in names) + "  accuracy")]
        for name, row, accuracy in zip(names, counts, details["accuracy_per_class"], strict=True):
            cells = "".join(f"{count or '·':>{cell}}" for count in row)
            percent = ACCURACY.format(math.nan if accuracy is None else accuracy)
            lines.append(("", f"{name:>{width}}{cells}{percent:>10}"))
        return lines

    def pictures(
        self, result: Mapping[str, Any], test: Split | None, columns: Mapping[str, np.ndarray]
    ) -> list[Picture]:
        """Return the confusion matrix, and examples with their predictions."""
        from mnist_ray.workload import drawing  # imports matplotlib

        return drawing.of_classification(self, self.class_names, result, test, columns)

    def top_predictions(self, outputs: Tensor) -> list[list[tuple[Any, float]]]:
        """Return the most probable classes of each example."""
        best = outputs.softmax(1).topk(min(_NUM_TOP, self.num_classes))
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[(self.class_names[number], value) for number, value in zip(*row, strict=True)] for row in rows]

    def _cross_entropy(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        from torch.nn import functional as F

        if targets.is_floating_point():
            if targets.shape != outputs.shape:  # not a probability of each class, as of mixed labels
                raise ExampleError(f"a batch has targets of type {targets.dtype}; class labels must be whole numbers")
        else:
            targets = targets.long()
        return F.cross_entropy(
            outputs, targets, ignore_index=_IGNORE_NONE, reduction="none", label_smoothing=label_smoothing
        )


def _class_names(data: Data) -> list[Any]:
    if "class_names" in data.metadata:
        return list(data.metadata["class_names"])
    if hasattr(data.train, "classes"):
        return list(data.train.classes)
    if not (isinstance(data.train, Arrays) and isinstance(data.train.targets, np.ndarray)):
        raise UsageError('the data name no classes: return Data(..., metadata={"class_names": [...]}) from load_data')
    arrays = [examples for examples in data.parts.values() if isinstance(examples, Arrays) and len(examples)]
    return list(range(1 + max(int(examples.targets.max()) for examples in arrays)))
