"""Looking at a workload's data: examples by index, counts per class: ``jobs/view.py`` once its flags are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from mnist_ray.config import ViewConfig
from mnist_ray.errors import UsageError, count, redact, say
from mnist_ray.settings import path_of
from mnist_ray.storage import write_file
from mnist_ray.workload.base import Workload
from mnist_ray.workload.classification import Classification
from mnist_ray.workload.data import Arrays, Split
from mnist_ray.workload.source import load_data, picture_of

_GRID_COLUMNS = 8


def view(workload: Workload, config: ViewConfig) -> None:
    """Print what the data set has, and draw the examples that are asked for. Raises UsageError and JobError."""
    data = load_data(workload)
    splits = {"train": Split(data.train), "test": Split(data.test)}
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for name, split in splits.items():
        say(f"{name:<7} {count(len(split), workload.noun)}")
    if config.stats:
        console.print(_stats(workload, splits))
        return
    split = splits[config.split]
    indices = choose(workload, split, config)
    images = [picture_of(workload, split[index][0]) for index in indices.tolist()]
    if len(indices) == 1:
        _print_one(console, workload, split, config, int(indices[0]), images[0])
    else:
        say(f"{workload.nouns:<7} {config.split} {indices[0]:,} to {indices[-1]:,}: {len(indices)} of them")
    if any(image is None for image in images):
        say(f"picture none: {type(workload).__name__} has no as_picture")
        return
    write_file(path_of(config.output, "--output"), _draw(workload, split, indices, images))  # type: ignore[arg-type]
    say(f"picture {config.output}")


def _draw(workload: Workload, split: Split, indices: np.ndarray, images: list[np.ndarray]) -> bytes:
    from mnist_ray.workload import figures  # imports matplotlib

    if len(indices) == 1:
        return figures.single_image(images[0])
    captions = [f"{index}: {_label(workload, split[index][1])}" for index in indices.tolist()]
    return figures.image_grid(images, captions, num_columns=_GRID_COLUMNS)


def _print_one(
    console: Console, workload: Workload, split: Split, config: ViewConfig, index: int, image: np.ndarray | None
) -> None:
    inputs, target = split[index]
    what = "label" if isinstance(workload, Classification) else "target"
    size = f"size {image.shape[1]}×{image.shape[0]}" if image is not None else f"inputs {_short(inputs)}"
    say(f"{workload.noun:<7} {config.split} {index:,}: {what} {_label(workload, target)}, {size}")
    if image is not None and console.is_terminal:
        console.print(blocks(image))


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
    """Return the indices of the examples to show. Raises UsageError where there are none."""
    candidates, having = np.arange(len(split)), ""
    if config.label is not None:
        candidates, having = _with_label(workload, split, config), f" with label {config.label}"
    if config.index >= len(candidates):
        last = len(candidates) - 1
        raise UsageError(
            f"--index {config.index} is out of range: {config.split} {workload.nouns}{having} are 0 to {last}"
        )
    return candidates[config.index : config.index + config.count]


def _with_label(workload: Workload, split: Split, config: ViewConfig) -> np.ndarray:
    if not isinstance(workload, Classification):
        raise UsageError(f"--label {config.label}: {type(workload).__name__} has no labels")
    names = [str(name) for name in workload.class_names]
    wanted = names.index(config.label) if config.label in names else -1
    found = np.flatnonzero(split.targets() == wanted)
    if len(found) == 0:
        known = f"0 to {len(names) - 1}" if names == [str(n) for n in range(len(names))] else ", ".join(names)
        raise UsageError(f"--label {config.label}: no {config.split} {workload.noun} has it; the labels are {known}")
    return found


def _stats(workload: Workload, splits: Mapping[str, Split]) -> Table:
    """Return a row per class with its examples, then means and standard deviations; of pixels as fractions of 255."""
    table = Table("class" if isinstance(workload, Classification) else "", *splits, box=None, padding=(0, 2, 0, 0))
    targets = [split.targets() for split in splits.values()]
    if isinstance(workload, Classification):
        names = workload.class_names
        counts = [np.bincount(some, minlength=len(names)) for some in targets]
        for name, row in zip(names, zip(*counts, strict=True), strict=True):
            table.add_row(redact(name), *(f"{number:,}" for number in row))
    else:
        for name, function in (("target mean", np.mean), ("target std", np.std), ("least", np.min), ("most", np.max)):
            table.add_row(name, *(f"{function(some):.4f}" for some in targets))
    if all(isinstance(split.examples, Arrays) for split in splits.values()):
        for name, function in (("mean", np.mean), ("std", np.std)):
            table.add_row(name, *(f"{_of_inputs(function, split.examples.inputs):.4f}" for split in splits.values()))
    return table


def _of_inputs(function: Any, inputs: np.ndarray) -> float:
    return float(function(inputs, dtype=np.float64)) / (255 if inputs.dtype == np.uint8 else 1)


def blocks(image: np.ndarray) -> Text:
    """Return an image as characters, each two pixels: the upper in its colour, the lower behind it."""
    text = Text()
    colours = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    for upper, lower in zip(colours[::2], colours[1::2], strict=False):
        for top, bottom in zip(upper.tolist(), lower.tolist(), strict=True):
            text.append("▀", Style(color=Color.from_rgb(*top), bgcolor=Color.from_rgb(*bottom)))
        text.append("\n")
    return text
