"""Data that are not in MNIST's own format, as MNIST's images: 28×28, grey, bright on dark."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from mnist_ray.errors import UsageError
from mnist_ray.mnist.idx import IMAGE_SHAPE
from mnist_ray.workload import sources
from mnist_ray.workload.data import Arrays, Data


def load(place: Path) -> Data:
    """Return pictures by class, a table of pixels, NumPy's files or a Hugging Face dataset as MNIST has its images.

    Raises UsageError where the images are of another size, and what ``sources.read`` does.
    """
    data = sources.read(place, size=IMAGE_SHAPE[0], is_grey=True, as_classes=True)
    return dataclasses.replace(data, train=_digits(data.train, place), test=_digits(data.test, place), validation=None)


def _digits(examples: Any, place: Path) -> Arrays:
    if not isinstance(examples, Arrays):
        pairs = [examples[index] for index in range(len(examples))]
        examples = Arrays(np.stack([image for image, _ in pairs]), np.array([target for _, target in pairs]))
    inputs = np.asarray(examples.inputs)
    if inputs[0].size != np.prod(IMAGE_SHAPE):
        shape = "×".join(map(str, inputs.shape[1:]))
        raise UsageError(f"--data-dir {place} has examples of {shape} numbers, not images of 28×28")
    if inputs.dtype != np.uint8:
        inputs = np.clip(inputs * (255.0 if inputs.max() <= 1 else 1.0), 0, 255).round().astype(np.uint8)
    return Arrays(inputs.reshape(-1, *IMAGE_SHAPE), np.asarray(examples.targets))
