"""Calls a workload's methods and checks their results. An error in the user's code becomes one line."""

from __future__ import annotations

import bdb
import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Arrays, Blocks, Data, Split, Splits, Streamed, as_streamed
from mnist_ray.data.digests import digest_of_files
from mnist_ray.data.splits import Fold, splits_of, subset
from mnist_ray.errors import JobError, UsageError, with_place
from mnist_ray.workload.base import Workload

if TYPE_CHECKING:
    from torch import nn

_FIXES = {"Tensor": "call .numpy()", "NoneType": "without targets, repeat the inputs"}


def data_of(workload: Workload) -> Data:
    """Return a workload's data; set its metadata unless a checkpoint has. Raises UsageError and JobError."""
    with placed(workload, "load_data"):
        data = _checked_data(workload, workload.load_data())
    if not workload.metadata:
        with placed(workload, "metadata_of"):
            workload.metadata = json.loads(json.dumps(dict(workload.metadata_of(data)), allow_nan=False))  # as saved
    with placed(workload, "check_data"):
        workload.check_data(data)
    return data


def seeded_model(workload: Workload, seed: int) -> nn.Module:
    """Return ``create_model()``, called with seeded generators of torch and NumPy; NumPy's is then restored."""
    import torch

    torch.manual_seed(seed)
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        return workload.create_model()
    finally:
        np.random.set_state(state)


def splits_for(workload: Workload, data: Data, config: TrainConfig) -> Splits:
    """Return a run's splits of its workload's ``data``. Raises UsageError.

    With ``--no-test``, the test set is left out. A whole cross-validation has the first fold's training and validation
    set, and the examples of all folds to test.
    """
    num_folds = config.folds
    if config.no_test:
        data = dataclasses.replace(data, test=None)
    if num_folds is None:
        return subset(splits_of(data, config.validation_size), config)
    with placed(workload, "strata"):
        strata = workload.strata(data)

    def of_fold(number: int) -> Splits:
        return subset(splits_of(data, config.validation_size, Fold(number - 1, num_folds, config.seed, strata)), config)

    if config.fold is not None:
        return of_fold(config.fold)
    tested = Split(data.train).transformed(data.transform)
    if config.limit < 1:
        indices = [of_fold(number).test.all_indices for number in range(1, num_folds + 1)]
        tested = tested.take(np.sort(np.concatenate(indices)))
    return dataclasses.replace(of_fold(1), name=data.name, test=tested)


@contextlib.contextmanager
def placed(workload: Workload, what: str) -> Iterator[None]:
    """Turn an exception in the user's code into a UsageError: one line, with file name and line number."""
    try:
        yield
    except (UsageError, JobError, bdb.BdbQuit):  # the last one ends a debugger
        raise
    except (Exception, SystemExit) as error:
        said = with_place(error, workload.source.folder)
        raise UsageError(f"{type(workload).__name__}, {what}: {said}") from error


def picture_of(workload: Workload, inputs: Any) -> np.ndarray | None:
    """Return one input as a picture, or None if inputs cannot be shown. Raises UsageError for a wrong type."""
    with placed(workload, "as_picture"):
        image = workload.as_picture(inputs)
    is_array = isinstance(image, np.ndarray)
    if image is None or (is_array and image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2:] == (3,))):
        return image
    got = f"{image.dtype} {image.shape}" if is_array else type(image).__name__
    raise UsageError(f"{type(workload).__name__}.as_picture must return uint8 (H, W) or (H, W, 3), not {got}")


def uses_outputs(workload: Workload, base: type[Workload]) -> bool:
    """Return whether a workload inherits ``loss``, ``measure`` or ``predictions`` unchanged from ``base``."""
    methods = ("loss", "measure", "predictions")
    return any(getattr(type(workload), method) is getattr(base, method) for method in methods)


def check_tensors(name: str, outputs: Any, targets: Any) -> None:
    """Raise UsageError unless a model's outputs and a batch's targets are tensors."""
    if not hasattr(outputs, "ndim"):
        raise UsageError(f"{name}: the model returns a {type(outputs).__name__}, not a tensor")
    if not hasattr(targets, "ndim"):
        fix = "return torch.tensor(targets) from collate, or numbers from the Dataset"
        raise UsageError(f"{name}: a batch's targets are a {type(targets).__name__}", fix=fix)


def _checked_data(workload: Workload, data: object) -> Data:
    name = type(workload).__name__
    if not isinstance(data, Data):
        raise UsageError(f"{name}.load_data returned {type(data).__name__}, not mnist_ray.workload.Data")
    train, files = as_streamed(data.train), tuple(data.files)
    sets = data.validation_sets
    metrics = [metric.name for metric in workload.all_metrics]
    are_named = bool(sets) and all(isinstance(of_set, str) and re.fullmatch(r"\w+", of_set) for of_set in sets)
    if isinstance(data.validation, Mapping) and not are_named:
        raise UsageError(f"{name}.load_data: validation: name each set with letters, digits and _")
    if taken := {f"{of_set}_{metric}" for of_set in sets for metric in metrics}.intersection(metrics):
        raise UsageError(f"{name}.load_data: validation: another metric is called {taken.pop()}; rename the set")
    for part, examples in {**data.parts, "train": train}.items():
        _check_examples(f"{name}.load_data: {part}", as_streamed(examples), may_stream=part == "train")
    digest_of_files(files)  # raises OSError if one is missing
    if data.weights is not None:
        _check_values(f"{name}.load_data: weights", data.weights, train, "biuf", "numbers")
        if not (np.isfinite(data.weights) & (data.weights >= 0)).all() or not data.weights.any():
            raise UsageError(f"{name}.load_data: weights must be finite numbers from 0, not all of them 0")
    if data.groups is not None:
        _check_values(f"{name}.load_data: groups", data.groups, train, "biuUS", "integers or texts")
    return dataclasses.replace(data, train=train, name=data.name or name, files=files)


def _check_examples(where: str, examples: Any, *, may_stream: bool) -> None:
    if isinstance(examples, Streamed):
        if not may_stream:
            raise UsageError(f"{where} is a stream without a length", fix="only the training data may be one")
        if isinstance(examples.source, Iterator):
            raise UsageError(f"{where} is an iterator, which can be read once", fix="give the function that makes it")
        return
    if isinstance(examples, Arrays):
        _check_arrays(where, examples)
    elif isinstance(examples, tuple) or not (hasattr(examples, "__getitem__") and hasattr(examples, "__len__")):
        kind = type(examples).__name__
        raise UsageError(f"{where} is of type {kind}, neither Arrays(inputs, targets) nor a Dataset with a length")
    if len(examples) == 0:
        raise UsageError(f"{where} holds no examples")


def _check_arrays(where: str, arrays: Arrays) -> None:
    for what, array in arrays.named.items():
        if not isinstance(array, np.ndarray) or array.ndim == 0:
            kind = type(array).__name__
            raise UsageError(f"{where}: {what} must be a NumPy array (N, ...), not {kind}", fix=_FIXES.get(kind, ""))
        if isinstance(array, np.ma.MaskedArray):
            raise UsageError(
                f"{where}: {what} are a masked array, whose mask would be ignored", fix="call .filled(VALUE)"
            )
        if array.dtype.kind not in "biuf":
            raise UsageError(f"{where}: {what} must be numbers, not of dtype {array.dtype}")
    (first, array), *others = arrays.named.items()
    for what, other in others:
        if len(other) != len(array):
            raise UsageError(f"{where} has {len(array):,} {first} but {len(other):,} {what}")


def _check_values(where: str, values: Any, train: Any, kinds: str, named: str) -> None:
    """Raise UsageError unless ``values`` are an array with one of these kinds of values for each training example."""
    if isinstance(train, (Blocks, Streamed)):
        raise UsageError(f"{where} are not for {'a stream' if isinstance(train, Streamed) else 'Blocks'}")
    if not isinstance(values, np.ndarray) or values.shape != (len(train),) or values.dtype.kind not in kinds:
        found = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
        raise UsageError(f"{where} must be a NumPy array of {named}, one per example, ({len(train)},), not {found}")
