"""Ready-made data for ``load_data``: folders of pictures, one folder per class; and Parquet, read in blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mnist_ray.errors import UsageError, first_line
from mnist_ray.settings import path_of
from mnist_ray.workload.data import Data
from mnist_ray.workload.order import Shuffled
from mnist_ray.workload.parquet import Parquet

parquet = Parquet
_TEST_PART, _TEST_SEED = 5, 53  # without a test set, a random fifth of the examples becomes the test set


def pictures(place: str | Path, *, size: int = 64, is_grey: bool = False) -> Data:
    """Return the pictures in ``place``, a folder per class; torchvision's ``ImageFolder`` reads each one when needed.

    Each picture is scaled and cut to a square: (3, ``size``, ``size``) uint8, or (1, …) in grey. ``place`` may have
    train/ and test/ (or val/) with these folders; without them, a random fifth is the test set. Raises UsageError.
    """
    from torchvision import datasets, transforms

    place = path_of(place, "the data's path")
    to_square = [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
    transform = transforms.Compose([transforms.Grayscale(), *to_square] if is_grey else to_square)
    roots = [folder for name in ("train", "test", "val") if (folder := place / name).is_dir()][:2]
    try:
        folders = [datasets.ImageFolder(root, transform) for root in roots or [place, place]]
    except OSError as error:
        raise UsageError(f"{place}: {first_line(error)}") from error
    if len(roots) == 1:
        raise UsageError(f"{place} has only {roots[0].name}/; it needs both train/ and test/")
    classes = folders[0].classes
    if any(folder.classes != classes for folder in folders):
        raise UsageError(f"{place}: {roots[0].name}/ and {roots[1].name}/ differ in classes")
    if not roots:
        order, num_test = Shuffled(len(folders[0]), [_TEST_SEED])[:], max(1, len(folders[0]) // _TEST_PART)
        for folder, part in zip(folders, (order[num_test:], order[:num_test]), strict=True):
            folder.samples = [folder.samples[index] for index in np.sort(part)]
    train, test = folders
    files = [file for folder in folders for file, _ in folder.samples]
    name = f"{place.name}, pictures of {len(classes)} classes"
    return Data(train, test, name=name, metadata={"class_names": classes}, files=files)
