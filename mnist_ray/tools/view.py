"""Looking at the data set: images by index, counts per class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from mnist_ray import config as settings
from mnist_ray.config import DataConfig, ViewConfig
from mnist_ray.display import pictures
from mnist_ray.errors import UsageError
from mnist_ray.storage import write_file
from mnist_ray.workload.mnist import idx as data
from mnist_ray.workload.mnist.idx import NUM_CLASSES, Split

_GRID_COLUMNS = 8


def view(flags: Mapping[str, Any]) -> None:
    """Print what the data set has, and draw the images that the flags choose. Raises UsageError and JobError."""
    config = settings.build(ViewConfig, flags)
    source = data.find(settings.build(DataConfig, flags))
    splits = {name: source.load(name) for name in ("train", "test")}
    console = Console(highlight=False, soft_wrap=True)
    for name, split in splits.items():
        console.print(f"{name:<8}{len(split):,} images")
    if config.stats:
        console.print(_stats(splits))
        return
    indices = choose(splits[config.split], config)
    images, labels = splits[config.split].images[indices], splits[config.split].labels[indices]
    if len(indices) == 1:
        height, width = images[0].shape
        console.print(f"image   {config.split} {indices[0]:,}: label {labels[0]}, size {width}×{height}")
        if console.is_terminal:
            console.print(blocks(images[0]))
        picture = pictures.digit(images[0])
    else:
        console.print(f"images  {config.split} {indices[0]:,} to {indices[-1]:,}: {len(indices)} of them")
        captions = [f"{index}: {label}" for index, label in zip(indices, labels, strict=True)]
        picture = pictures.digits(images, captions, num_columns=_GRID_COLUMNS)
    write_file(config.output, picture)
    console.print(f"picture {config.output}")


def choose(split: Split, config: ViewConfig) -> np.ndarray:
    """Return the indices of the images to show. Raises UsageError where there are none."""
    candidates = np.arange(len(split)) if config.label is None else np.flatnonzero(split.labels == config.label)
    having = "" if config.label is None else f" with label {config.label}"
    if len(candidates) == 0:
        raise UsageError(
            f"--label {config.label}: no {config.split} image has it; the labels are 0 to {split.labels.max()}"
        )
    if config.index >= len(candidates):
        last = len(candidates) - 1
        raise UsageError(f"--index {config.index} is out of range: {config.split} images{having} are 0 to {last}")
    return candidates[config.index : config.index + config.count]


def _stats(splits: Mapping[str, Split]) -> Table:
    table = Table("class", *splits, box=None, padding=(0, 2, 0, 0))
    counts = [np.bincount(split.labels, minlength=NUM_CLASSES) for split in splits.values()]
    for label, row in enumerate(zip(*counts, strict=True)):
        table.add_row(str(label), *(f"{count:,}" for count in row))
    for name, function in (("mean", np.mean), ("std", np.std)):
        values = (function(split.images, dtype=np.float64) / 255 for split in splits.values())
        table.add_row(name, *(f"{value:.4f}" for value in values))
    return table


def blocks(image: np.ndarray) -> Text:
    """Return an image (H, W) uint8 as characters, each two pixels: the upper in its colour, the lower behind it."""
    text = Text()
    for upper, lower in zip(image[::2], image[1::2], strict=True):
        for top, bottom in zip(upper.tolist(), lower.tolist(), strict=True):
            style = Style(color=Color.from_rgb(top, top, top), bgcolor=Color.from_rgb(bottom, bottom, bottom))
            text.append("▀", style)
        text.append("\n")
    return text
