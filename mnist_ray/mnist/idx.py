"""Reads MNIST's files, which have the IDX format."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from mnist_ray.data.data import Arrays
from mnist_ray.errors import JobError, UsageError
from mnist_ray.settings import path_of

IMAGE_SHAPE = (28, 28)
_MAX_CLASSES = 10
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
SHIPPED = Path(__file__).with_name("data")


def load(split: str, data_dir: Path | None = None) -> Arrays:
    """Read ``"train"`` or ``"test"`` from a folder with MNIST's four files; None: from the files in the package.

    Raises UsageError if there is no such folder, JobError if a file is missing or damaged.
    """
    folder = SHIPPED if data_dir is None else path_of(data_dir, "--data-dir")
    if not folder.is_dir():
        raise UsageError(f"--data-dir {folder} is not a folder")
    images_file, labels_file = (folder / name for name in FILES[split])
    images, labels = _read(images_file, 3), _read(labels_file, 1)
    if images.shape[1:] != IMAGE_SHAPE:
        raise JobError(f"{images_file} has images of {images.shape[1]}×{images.shape[2]}, not 28×28")
    if len(images) != len(labels):
        raise JobError(f"{folder} has {len(images):,} {split} images but {len(labels):,} labels")
    if len(labels) == 0:
        raise JobError(f"{images_file} holds no images")
    if labels.max() >= _MAX_CLASSES:
        raise JobError(f"{labels_file} has label {labels.max()}; the classes are 0 to 9")
    return Arrays(images, labels)


def _read(path: Path, num_dims: int) -> np.ndarray:
    """Read a file, gzipped or not. Bytes: 0, 0, type (8: uint8), number of dimensions, big-endian sizes, values.

    The format: http://yann.lecun.com/exdb/mnist/
    """
    content, header_size, magic = _content_of(path), 4 + 4 * num_dims, bytes((0, 0, 8, num_dims))
    if content[:4] != magic or len(content) < header_size:
        found = f"it starts with {content[:4].hex(' ')}, not {magic.hex(' ')}, or ends within its header"
        raise JobError(f"{path} is not the IDX file expected: {found}")
    shape = np.frombuffer(content, ">u4", num_dims, offset=4).tolist()
    expected_size = header_size + math.prod(shape)
    if len(content) != expected_size:
        raise JobError(f"{path} should have {expected_size:,} bytes according to its header, but has {len(content):,}")
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)


def _content_of(path: Path) -> bytes:
    try:
        if path.is_file():
            return path.read_bytes()
        path = path.with_name(f"{path.name}.gz")
        return gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise JobError(f"{path} is a damaged gzip file: {error}") from error
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error.strerror}") from error
