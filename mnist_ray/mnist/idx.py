"""MNIST's files: finding them, reading and checking the IDX format."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mnist_ray.errors import JobError, UsageError
from mnist_ray.settings import path_of
from mnist_ray.workload.data import Arrays

IMAGE_SHAPE = (28, 28)
_MOST_CLASSES = 10
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
SHIPPED = Path(__file__).with_name("data")


def load(split: str, data_dir: Path | None = None) -> Arrays:
    """Read ``"train"`` or ``"test"`` of MNIST, which comes with the package, or of another folder with its four files.

    Raises UsageError if the folder has no such files, JobError if they are damaged.
    """
    folder, sha256 = SHIPPED, _MNIST_SHA256
    if data_dir is not None:
        folder, sha256 = _idx_folder(path_of(data_dir, "--data-dir")), {}
    images_name, labels_name = FILES[split]
    images = _read(folder / images_name, 3, sha256)
    labels = _read(folder / labels_name, 1, sha256)
    if images.shape[1:] != IMAGE_SHAPE:
        raise JobError(f"{folder / images_name} has images of {images.shape[1]}×{images.shape[2]}, not 28×28")
    if len(images) != len(labels):
        raise JobError(f"{folder} has {len(images):,} {split} images but {len(labels):,} labels")
    if len(labels) == 0:
        raise JobError(f"{folder / images_name} holds no images")
    if labels.max() >= _MOST_CLASSES:
        raise JobError(f"{folder / labels_name} has label {labels.max()}; the classes are 0 to 9")
    return Arrays(images, labels)


def _read(path: Path, num_dims: int, sha256: Mapping[str, str]) -> np.ndarray:
    content = _read_maybe_gzipped(path)
    if path.name in sha256 and hashlib.sha256(content).hexdigest() != sha256[path.name]:
        raise JobError(f"{path} is not the file that was shipped; reinstall mnist_ray")
    return _parse_idx(content, num_dims, path)


def _idx_folder(root: Path) -> Path:
    """Return the folder at or below ``root`` with the four files: itself, ``raw`` or one ``NAME/raw``."""
    try:
        if not root.is_dir():
            raise UsageError(f"--data-dir {root} is not a folder")
        candidates = [root, root / "raw", *sorted(root.glob("*/raw"))]
        found = [folder for folder in candidates if all(map(_exists, _paths(folder)))]
        if not found:
            missing = [path.name for path in _paths(root) if not _exists(path)]
            raise UsageError(
                f"--data-dir {root} lacks {', '.join(missing)} (gzipped or not; also looked in raw/ and */raw/)"
            )
    except OSError as error:
        raise UsageError(f"--data-dir {root} cannot be read: {error.strerror}") from error
    if len(found) > 1:
        raise UsageError(f"--data-dir {root} holds several data sets; name one: {', '.join(map(str, found))}")
    return found[0]


def _paths(folder: Path) -> list[Path]:
    return [folder / name for names in FILES.values() for name in names]


def _gzipped(path: Path) -> Path:
    return path.with_name(path.name + ".gz")


def _exists(path: Path) -> bool:
    return path.is_file() or _gzipped(path).is_file()


def _read_maybe_gzipped(path: Path) -> bytes:
    try:
        if path.is_file():
            return path.read_bytes()
        path = _gzipped(path)
        return gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise JobError(f"{path} is a damaged gzip file: {error}") from error
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error.strerror}") from error


def _parse_idx(content: bytes, num_dims: int, path: Path) -> np.ndarray:
    """Parse IDX bytes: 0, 0, type (8: uint8), number of dimensions, big-endian sizes, values.

    The format: http://yann.lecun.com/exdb/mnist/
    """
    header_size = 4 + 4 * num_dims
    expected_magic = bytes((0, 0, 8, num_dims))
    if content[:4] != expected_magic:
        magic = f"{content[:4].hex(' ')}, not {expected_magic.hex(' ')}"
        raise JobError(f"{path} is not the IDX file expected: it starts with {magic}")
    if len(content) < header_size:
        raise JobError(f"{path} ends within its header")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", num_dims, offset=4))
    expected_size = header_size + math.prod(shape)
    if len(content) != expected_size:
        raise JobError(f"{path} should have {expected_size:,} bytes by its header, but has {len(content):,}")
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)
