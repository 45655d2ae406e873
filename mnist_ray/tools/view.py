"""Shows examples of a workload's data: ``mnist-ray view`` after flag parsing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mnist_ray.config import ViewConfig
from mnist_ray.data.data import Split
from mnist_ray.errors import UsageError
from mnist_ray.output import say
from mnist_ray.settings import path_of
from mnist_ray.storage import write_file
from mnist_ray.text import count
from mnist_ray.workload.base import Workload
from mnist_ray.workload.calls import data_of, picture_of, placed
from mnist_ray.workload.classification import Classification
from mnist_ray.workload.drawing import image_grid, single_image

_MAX_VALUES, _MAX_TEXT = 16, 80  # of an array or, in characters, of a text that is printed whole
_FORMAT: Any = {"float_kind": "{:g}".format, "int_kind": str, "bool": str}


def view(workload: Workload, config: ViewConfig) -> None:
    """Print the size of the data, and draw the chosen examples. Raises UsageError and JobError."""
    data = data_of(workload)
    splits = {"train": Split(data.train).transformed(data.train_transform, data.transform)}
    if data.test is not None:
        splits["test"] = Split(data.test).transformed(data.transform)
    for name, split in splits.items():
        say(f"{name:<7} {count(len(split), workload.noun)}")
    if config.split not in splits:
        raise UsageError("--split test: the data have no test set")
    chosen = splits[config.split]
    if config.index >= len(chosen):
        known = f"{config.split} {workload.nouns} are 0 to {len(chosen) - 1}"
        raise UsageError(f"--index {config.index} is out of range: {known}")
    indices = range(config.index, min(config.index + config.count, len(chosen)))
    names = workload.class_names if isinstance(workload, Classification) else None
    with placed(workload, "an example"):
        examples = [chosen[index] for index in indices]
        images = [image for inputs, _ in examples if (image := picture_of(workload, inputs)) is not None]
        targets = [target if names is None else names[int(target)] for _, target in examples]
    if len(images) == len(examples) > 1:
        say(f"{workload.nouns:<7} {config.split} {indices[0]:,} to {indices[-1]:,}")
    else:
        for index, (inputs, _), target in zip(indices, examples, targets, strict=True):
            say(f"{workload.noun:<7} {config.split} {index:,}")
            say(f"inputs  {_short(inputs)}")
            say(f"{'label' if names else 'target':<7} {_short(target)}")
    if len(images) < len(examples):
        say(f"picture none: {type(workload).__name__} has no as_picture")
        return
    captions = [f"{index}: {_short(target)}" for index, target in zip(indices, targets, strict=True)]
    png = single_image(images[0]) if len(images) == 1 else image_grid(images, captions)
    write_file(path_of(config.output, "--output"), png)
    say(f"picture {config.output}")


def _short(value: Any) -> str:
    """Return a value as one line; for a long array, shape, dtype, and the range, some values or the share of True."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_short(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)) and not all(isinstance(item, (int, float, np.generic)) for item in value):
        return "; ".join(map(_short, value))
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        return f"{value}" if len(str(value)) <= _MAX_TEXT else f"{str(value)[:_MAX_TEXT]}…"
    text = np.array2string(array, threshold=_MAX_VALUES, separator=", ", max_line_width=10_000, formatter=_FORMAT)
    if not array.size or (array.ndim < 2 and array.size <= _MAX_VALUES):
        return text
    if array.ndim > 1:
        text = f"{array.min():.4g} to {array.max():.4g}"
    return f"{array.shape} {array.dtype}, " + (f"{array.mean():.0%} true" if array.dtype == bool else text)
