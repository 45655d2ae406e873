"""The examples of a workload: arrays, or any map-style data set, and splits of them; less of them to try things out."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mnist_ray.config import TrainConfig
from mnist_ray.errors import UsageError, count
from mnist_ray.workload.order import AllBut, Shuffled

if TYPE_CHECKING:
    from torch.utils.data import Dataset


_HOLD_OUT_SEED = 28
_MOST_HELD_OUT = 5000  # by default; more would only make validation slower
_MOST_FILES_ASKED = 1000  # for their size and time; of more, so many evenly spaced: a server may need long for each


@dataclass(frozen=True)
class Arrays:
    """Examples as arrays of any shape and dtype, in memory or memory-mapped."""

    inputs: np.ndarray
    """(N, ...)."""
    targets: np.ndarray
    """(N, ...): (N,) whole numbers from 0 on for a classification."""

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def is_mapped(self) -> bool:
        """Whether an array lies in a file, which each process maps for itself."""
        return isinstance(self.inputs, np.memmap) or isinstance(self.targets, np.memmap)


@dataclass(frozen=True)
class Data:
    """What a workload's ``load_data`` returns.

    Arrays in memory are loaded once, by the job, and shared through Ray's object store: one copy a node. Memory-mapped
    arrays and ``Dataset``s are opened by each process, which calls ``load_data`` itself; an item of a ``Dataset`` is a
    pair (input, target).
    """

    train: Arrays | Dataset
    test: Arrays | Dataset
    validation: Arrays | Dataset | None = None
    """None: it is held out from ``train``."""
    name: str = ""
    """Shown to people; by default that of the workload."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the model must know of the data, as JSON: kept in every checkpoint, and everywhere ``self.metadata``."""
    files: Sequence[str | Path] = ()
    """What a ``Dataset`` reads its examples from: a run does not go on where these have changed."""


Origin = Literal["train", "validation", "test"]


class Split:
    """Some of the examples of ``Arrays`` or of a ``Dataset``, in an order of their own."""

    def __init__(self, examples: Any, indices: np.ndarray | AllBut | None = None, origin: Origin = "train") -> None:
        self.examples = examples
        self.origin = origin
        """Which of a workload's ``Data`` the examples are."""
        self.indices = indices
        """Which of ``examples``; None: all."""

    def __len__(self) -> int:
        return len(self.examples) if self.indices is None else len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return one example's (input, target)."""
        place = index if self.indices is None else int(self.indices[index])
        if isinstance(self.examples, Arrays):
            return self.examples.inputs[place], self.examples.targets[place]
        example: tuple[Any, Any] = self.examples[place]
        return example

    def places(self, indices: np.ndarray) -> np.ndarray:
        """Return which of ``examples`` some of its own are."""
        return indices if self.indices is None else self.indices[indices]

    @property
    def is_in_memory(self) -> bool:
        """Whether it can be handed to other processes; else each opens it for itself."""
        return isinstance(self.examples, Arrays) and not self.examples.is_mapped

    @property
    def arrays(self) -> Arrays | None:
        """The whole as arrays in memory, where they are."""
        return self.examples if self.is_in_memory and self.indices is None else None

    def take(self, indices: np.ndarray | AllBut) -> Split:
        """Return some of its examples; of arrays in memory, a copy."""
        if self.indices is not None:
            indices = self.indices[indices]
        if self.is_in_memory:
            return Split(Arrays(self.examples.inputs[indices], self.examples.targets[indices]), None, self.origin)
        return Split(self.examples, indices, self.origin)

    def between(self, start: int, stop: int) -> Split:
        """Return the examples from ``start`` up to ``stop``, which is not one of them; of arrays, a view."""
        if self.arrays is not None:
            return Split(Arrays(self.arrays.inputs[start:stop], self.arrays.targets[start:stop]), None, self.origin)
        return self.take(np.arange(start, min(stop, len(self))))

    def targets(self) -> np.ndarray:
        """Return all targets; a ``Dataset`` is read from end to end for that."""
        if isinstance(self.examples, Arrays):
            targets = self.examples.targets
            return np.asarray(targets if self.indices is None else targets[self.indices])
        return np.array([np.asarray(self[index][1]) for index in range(len(self))])

    def digest(self) -> str | None:
        """Return a digest that identifies the data: of arrays in memory their content, else the state of their files.

        None where they are not known: of a ``Dataset`` that does not say what it reads.
        """
        if self.arrays is not None:
            return _sha256(self.arrays.inputs, self.arrays.targets)
        try:
            if isinstance(self.examples, Arrays):
                arrays = self.examples.inputs, self.examples.targets
                return " ".join(
                    digest_of_files([str(a.filename)]) if isinstance(a, np.memmap) else _sha256(a) for a in arrays
                )
            # torchvision's folders have pairs of a file and its class
            return digest_of_files([path for path, _ in self.examples.samples])
        except (AttributeError, TypeError, ValueError, OSError):
            return None


def _sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def digest_of_files(paths: Iterable[str | Path]) -> str:
    """Return a digest of files by their names, sizes and times. Raises OSError where one is not there."""
    files = [os.fspath(path) for path in paths]
    folder = os.path.commonpath(map(os.path.dirname, files)) if files else ""
    digest = hashlib.sha256("\n".join(file[len(folder) :] for file in files).encode())
    for index in np.linspace(0, len(files) - 1, min(_MOST_FILES_ASKED, len(files)), dtype=int):
        stat = os.stat(files[index])
        digest.update(f"{stat.st_size} {int(stat.st_mtime)} ".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Splits:
    """A workload's data, ready for a run."""

    name: str
    train: Split
    validation: Split
    """Empty where nothing is held out."""
    test: Split
    files: Sequence[str | Path] = ()
    """What the examples are read from, where the workload says so."""

    @cached_property
    def digests(self) -> dict[str, str | None]:
        """By what the data are told from others: a digest of each part, and of the files; None where it has none."""
        digests: dict[str, str | None] = {}
        for name, split in (("training", self.train), ("validation", self.validation), ("test", self.test)):
            digest = split.digest()
            if digest is not None or not self.files:
                digests[name] = digest
        return digests | ({"files": digest_of_files(self.files)} if self.files else {})


def hold_out(split: Split, num_validation: int) -> tuple[Split, Split]:
    """Split into (training, validation) examples.

    The choice is random, so that files sorted by label do no harm, and the same for every run and seed, so that runs
    compare on the same examples.
    """
    validation = np.sort(Shuffled(len(split), [_HOLD_OUT_SEED])[:num_validation])
    return split.take(AllBut(len(split), validation)), split.take(validation)


def default_validation_size(num_train: int) -> int:
    """Return how many of some training examples are held out where nobody says: a tenth, at most 5,000."""
    return min(_MOST_HELD_OUT, num_train // 10)


def splits_of(data: Data, validation_size: int | None) -> Splits:
    """Make the parts of a run of a workload's data. Raises UsageError where ``validation_size`` does not fit."""
    train, test = Split(data.train), Split(data.test, origin="test")
    if validation_size == 0:
        return Splits(data.name, train, train.between(0, 0), test, data.files)
    if data.validation is not None and validation_size is None:
        return Splits(data.name, train, Split(data.validation, origin="validation"), test, data.files)
    size = default_validation_size(len(train)) if validation_size is None else validation_size
    if size >= len(train):
        raise UsageError(
            f"--validation-size {size:,} leaves nothing to train on: the data has {len(train):,} training examples"
        )
    return Splits(data.name, *hold_out(train, size), test, data.files)


_SEED = 41
_LEARNED = 0.1  # of the loss before


def subset(splits: Splits, config: TrainConfig) -> Splits:
    """Return what ``--limit`` and ``--overfit-batches`` leave of the data; the same for every run and seed."""
    if config.limit < 1:
        shown = f"{config.limit:.3g} of {splits.name}"
        train, validation, test = (
            _some(split, config.limit) for split in (splits.train, splits.validation, splits.test)
        )
        splits = dataclasses.replace(splits, name=shown, train=train, validation=validation, test=test)
    if config.overfit_batches is None:
        return splits
    size = min(len(splits.train), config.overfit_batches * config.batch_size)
    chosen = np.sort(Shuffled(len(splits.train), [_SEED])[:size])
    few, times = splits.train.take(chosen), max(1, len(splits.train) // size)
    return dataclasses.replace(
        splits,
        name=f"{count(config.overfit_batches, 'batch', 'batches')} of {splits.name}, {count(times, 'time')}",
        train=few.take(np.tile(np.arange(size), times)),
        validation=few.between(0, 0),
        test=few,
    )


def _some(split: Split, limit: float) -> Split:
    size = min(len(split), max(1, round(limit * len(split))))
    return split.take(np.sort(Shuffled(len(split), [_SEED])[:size])) if len(split) else split


def verdict(loss_before: float, loss_after: float) -> str:
    """Return what ``--overfit-batches`` has shown, by the loss of the first step and that on the same examples now."""
    went = f"the loss went from {loss_before:.4g} to {loss_after:.4g}"
    if loss_after <= _LEARNED * loss_before:
        return f"{went}: the model can learn these examples"
    return (
        f"{went}: the model has not learned even these examples; either something is broken (the targets, prepare, the "
        "loss, a layer), or it takes more --num-epochs or another --learning-rate"
    )
