"""Shows examples of a workload's data, or statistics: ``jobs/view.py`` after flag parsing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mnist_ray.config import ViewConfig
from mnist_ray.errors import UsageError, count, redact, say
from mnist_ray.settings import path_of
from mnist_ray.storage import write_file
from mnist_ray.workload.base import Workload
from mnist_ray.workload.classification import Classification
from mnist_ray.workload.data import Arrays, Split
from mnist_ray.workload.figures import image_grid, single_image
from mnist_ray.workload.loading import load_data, picture_of

_GRID_COLUMNS = 8


def view(workload: Workload, config: ViewConfig) -> None:
    """Print the size of the data, and draw the chosen examples. Raises UsageError and JobError."""
    data = load_data(workload)
    splits = {"train": Split(data.train), "test": Split(data.test)}
    for name, split in splits.items():
        say(f"{name:<7} {count(len(split), workload.noun)}")
    if config.stats:
        Console(highlight=False, markup=False, emoji=False, soft_wrap=True).print(_stats(workload, splits))
        return
    indices = choose(workload, splits[config.split], config).tolist()
    examples = [splits[config.split][index] for index in indices]
    images = [image for inputs, _ in examples if (image := picture_of(workload, inputs)) is not None]
    labels = [_label(workload, target) for _, target in examples]
    if len(examples) == 1:
        what = "label" if isinstance(workload, Classification) else "target"
        size = f"size {images[0].shape[1]}×{images[0].shape[0]}" if images else f"inputs {_short(examples[0][0])}"
        say(f"{workload.noun:<7} {config.split} {indices[0]:,}: {what} {labels[0]}, {size}")
    else:
        say(f"{workload.nouns:<7} {config.split} {indices[0]:,} to {indices[-1]:,}: {len(indices)} of them")
    if len(images) < len(examples):
        say(f"picture none: {type(workload).__name__} has no as_picture")
        return
    captions = [f"{index}: {label}" for index, label in zip(indices, labels, strict=True)]
    png = single_image(images[0]) if len(images) == 1 else image_grid(images, captions, num_columns=_GRID_COLUMNS)
    write_file(path_of(config.output, "--output"), png)
    say(f"picture {config.output}")


def _short(inputs: Any) -> str:
    values = np.asarray(inputs)
    if values.size > 16:
        return f"{' × '.join(map(str, values.shape))} {values.dtype}"
    return np.array2string(values, precision=4, separator=", ", max_line_width=10_000)


def _label(workload: Workload, target: Any) -> str:
    if isinstance(workload, Classification):
        return str(workload.class_names[int(target)])
    return f"{float(target):g}" if np.ndim(target) == 0 else str(np.asarray(target).tolist())


def choose(workload: Workload, split: Split, config: ViewConfig) -> np.ndarray:
    """Return the indices of the chosen examples. Raises UsageError if there are none."""
    candidates, having = np.arange(len(split)), ""
    if config.label is not None:
        candidates, having = _with_label(workload, split, config), f" with label {config.label}"
    if config.index >= len(candidates):
        known = f"{config.split} {workload.nouns}{having} are 0 to {len(candidates) - 1}"
        raise UsageError(f"--index {config.index} is out of range: {known}")
    return candidates[config.index : config.index + config.count]


def _with_label(workload: Workload, split: Split, config: ViewConfig) -> np.ndarray:
    if not isinstance(workload, Classification):
        raise UsageError(f"--label {config.label}: {type(workload).__name__} has no labels")
    names = [str(name) for name in workload.class_names]
    found = np.flatnonzero(split.targets() == (names.index(config.label) if config.label in names else -1))
    if len(found) == 0:
        known = ", ".join(names)
        raise UsageError(f"--label {config.label}: no {config.split} {workload.noun} has it; the labels are {known}")
    return found


def _stats(workload: Workload, splits: Mapping[str, Split]) -> Table:
    """Return the number of examples per class, or statistics of the targets; if inputs are arrays, their mean and std.

    Inputs of type uint8 are divided by 255.
    """
    table = Table("class" if isinstance(workload, Classification) else "", *splits, box=None, padding=(0, 2, 0, 0))
    targets = [split.targets() for split in splits.values()]
    if isinstance(workload, Classification):
        names = workload.class_names
        counts = [np.bincount(each, minlength=len(names)) for each in targets]
        for name, row in zip(names, zip(*counts, strict=True), strict=True):
            table.add_row(redact(name), *(f"{number:,}" for number in row))
    else:
        for name, function in (("target mean", np.mean), ("target std", np.std), ("least", np.min), ("most", np.max)):
            table.add_row(name, *(f"{function(each):.4f}" for each in targets))
    inputs = [split.examples.inputs for split in splits.values() if isinstance(split.examples, Arrays)]
    if len(inputs) == len(splits):
        for moment in (np.mean, np.std):
            values = [moment(each, dtype=np.float64) / (255 if each.dtype == np.uint8 else 1) for each in inputs]
            table.add_row(moment.__name__, *(f"{value:.4f}" for value in values))
    return table
