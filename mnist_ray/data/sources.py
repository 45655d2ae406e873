"""Ready-made data for ``load_data``: folders of images, a folder per class; Parquet in blocks; Hugging Face."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import fs
from pyarrow import parquet as pq

from mnist_ray.data.columns import arrays_of, check_kinds, of_rows
from mnist_ray.data.data import Arrays, Blocks, Data, Streamed, Transform, as_streamed
from mnist_ray.data.files import files_at, identity_of, opened, version_of
from mnist_ray.data.images import open_picture
from mnist_ray.data.order import Shuffled
from mnist_ray.errors import UsageError
from mnist_ray.settings import path_of
from mnist_ray.storage import STORAGE_ERRORS, in_one_line

__all__ = ["Parquet", "huggingface", "open_picture", "pictures"]

_TEST_PART, _TEST_SEED = 5, 53  # without a test set, a random fifth of the examples becomes the test set
_MAX_NAMED = 5  # classes
_NUM_THREADS = 16  # that read footers
_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def pictures(
    place: str | Path,
    *,
    size: int = 64,
    is_grey: bool = False,
    train_transform: Transform | None = None,
    transform: Transform | None = None,
) -> Data:
    """Return the images in ``place``, a folder per class; each one is read when it is needed.

    ``train_transform`` is called on each image to train on, and ``transform`` then on every image: Pillow's, in RGB. By
    default, ``transform`` scales and crops to a square: (3, ``size``, ``size``) uint8, or (1, …) in grey. ``place`` may
    have train/ with these folders, and test/ and val/, for validation, or one of them. Without them, a random fifth is
    the test set. Hidden files and folders are ignored. Raises UsageError.
    """
    place = path_of(place, "the data's path")
    parts: dict[str, Any] = {
        name: _ImageFolder.at(place / name) for name in ("train", "test", "val") if (place / name).is_dir()
    }
    if parts and "train" not in parts:
        raise UsageError(f"{place} has {' and '.join(f'{name}/' for name in parts)}; it needs train/")
    if not parts:
        parts = _ImageFolder.at(place).divided()
    classes = parts["train"].classes
    for name, folder in parts.items():
        if folder.classes != classes:
            raise UsageError(f"{place}: train/ and {name}/ differ in classes")
    return Data(
        train=parts["train"],
        test=parts.get("test"),
        validation=parts.get("val"),
        name=f"{place.name}, pictures of {len(classes)} classes"
        + (f" ({', '.join(classes)})" if len(classes) <= _MAX_NAMED else ""),
        metadata={"class_names": classes},
        files=[file for folder in parts.values() for file, _ in folder.samples],
        train_transform=train_transform,
        transform=transform or _to_square(size, is_grey=is_grey),
    )


def _to_square(size: int, *, is_grey: bool) -> Transform:
    from torchvision import transforms

    to_grey = [transforms.Grayscale()] if is_grey else []
    return transforms.Compose(  # type: ignore[no-any-return]
        [*to_grey, transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
    )


class _ImageFolder:
    """Images in RGB, each with the number of its class; ``samples`` are pairs (file, class), as in torchvision."""

    def __init__(self, classes: list[str], samples: list[tuple[str, int]]) -> None:
        self.classes, self.samples = classes, samples
        self.targets = [target for _, target in samples]

    @classmethod
    def at(cls, root: Path) -> _ImageFolder:
        """Return the images in a folder per class, sorted. Raises UsageError if a class has none."""
        with in_one_line(f"{root} cannot be read"):
            classes = sorted(found.name for found in root.iterdir() if found.is_dir() and found.name[0] != ".")
        samples = []
        for number, name in enumerate(classes):
            files = [(file, number) for file in _images_in(root / name)]
            if not files:
                raise UsageError(f"{root / name} has no images")
            samples += files
        if not classes:
            raise UsageError(f"{root} has no folder with images, one for each class")
        return cls(classes, samples)

    def divided(self) -> dict[str, Any]:
        """Return the images to train on, and a random fifth for the test."""
        order, num_test = Shuffled(len(self), [_TEST_SEED])[:], max(1, len(self) // _TEST_PART)
        parts = {"train": np.sort(order[num_test:]), "test": np.sort(order[:num_test])}
        return {name: _ImageFolder(self.classes, [self.samples[i] for i in part]) for name, part in parts.items()}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, target = self.samples[index]
        return open_picture(file).convert("RGB"), target


def _images_in(folder: Path) -> Iterator[str]:
    """Yield the images in a folder and below, except what is hidden, such as Jupyter's ``.ipynb_checkpoints``."""
    for place, _, names in sorted(os.walk(folder, followlinks=True)):
        if f"{os.sep}." not in place[len(str(folder)) :]:
            images = [name for name in sorted(names) if name.lower().endswith(_SUFFIXES) and name[0] != "."]
            yield from (os.path.join(place, name) for name in images)


def huggingface(dataset: Any, inputs: str | Sequence[str], targets: str | Sequence[str]) -> Any:
    """Return examples whose items are dicts, such as those of a Hugging Face ``datasets.Dataset``, as pairs.

    ``inputs`` and ``targets`` name a key each; several keys become a dict of their values. A ``Dataset`` of Hugging
    Face keeps the names of its classes, and a run is not resumed if it has changed. One with ``streaming=True`` becomes
    a stream. Raises UsageError if it has no such column.
    """
    columns = getattr(dataset, "column_names", None) or ()  # a stream may not know its own
    for name in [*_names(inputs), *_names(targets)]:
        if columns and name not in columns:
            raise UsageError(f"the data set has no column {name}, only {', '.join(columns)}")
    pair_of = functools.partial(_pair_of, inputs=inputs, targets=targets)
    if isinstance(as_streamed(dataset), Streamed):
        return Streamed(dataset, decode=pair_of)
    features = getattr(dataset, "features", None) or {}
    feature = features.get(targets) if isinstance(targets, str) else None
    return _Pairs(dataset, pair_of, getattr(feature, "names", None))


def _names(keys: str | Sequence[str]) -> Sequence[str]:
    return [keys] if isinstance(keys, str) else keys


def _pair_of(item: Any, inputs: str | Sequence[str], targets: str | Sequence[str]) -> tuple[Any, Any]:
    found = [item[keys] if isinstance(keys, str) else {key: item[key] for key in keys} for keys in (inputs, targets)]
    return found[0], found[1]


class _Pairs:
    """A ``Dataset`` whose items become pairs."""

    def __init__(self, dataset: Any, pair_of: Callable[[Any], tuple[Any, Any]], classes: list[str] | None) -> None:
        self.dataset, self.pair_of = dataset, pair_of
        self.identity = getattr(dataset, "_fingerprint", None)  # of Hugging Face: it changes with the data
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.pair_of(self.dataset[index])


class Parquet(Blocks):
    """The rows of Parquet files; each row group is a block.

    ``place``: a path or URI of a file, of a folder with ``.parquet`` files, or with ``*``. ``columns``: those of the
    inputs, then that of the targets; by default all, without pandas' index. They hold numbers, lists of equal lengths,
    tensors of Ray Data, or images as Hugging Face writes them, which become (H, W) or (H, W, 3) uint8. Several
    columns of inputs hold numbers and become (columns,) float32. Instead, ``decode`` may turn a row, a dict by column,
    into (input, target); like ``Blocks.read``, it must not draw random numbers. Raises UsageError if there are no such
    files or columns.
    """

    def __init__(
        self,
        place: str | Path,
        *,
        columns: Sequence[str] | None = None,
        decode: Callable[[dict[str, Any]], tuple[Any, Any]] | None = None,
    ) -> None:
        self._filesystem, paths = files_at(str(place), (".parquet",), "Parquet")
        with in_one_line(f"{place} cannot be read"), ThreadPoolExecutor(_NUM_THREADS) as threads:
            files = list(threads.map(lambda path: _opened(self._filesystem, path), paths))
        schemas = [file.footer.schema.to_arrow_schema() for file in files]
        known = [schema.names for schema in schemas]
        # With decode, an index that has a name is a column.
        index = [name for name in _index_of(schemas[0]) if decode is None or str(name).startswith("__index_level_")]
        self._columns, self._decode = list(columns or [name for name in known[0] if name not in index]), decode
        for file, names in zip(files, known, strict=True):
            if missing := [name for name in self._columns if name not in names]:
                raise UsageError(f"{file.path} has no column {missing[0]}, only {', '.join(names)}")
            if several := [name for name in self._columns if names.count(name) > 1]:
                raise UsageError(f"{file.path} has several columns {several[0]}: rename all but one")
        for schema in schemas:
            check_kinds(pa.schema([schema.field(name) for name in self._columns]))
        if len(self._columns) < 2:
            raise UsageError(f"{place}: name at least two columns, those of the inputs, then that of the targets")
        groups = [(file, group) for file in files for group in range(file.footer.num_row_groups)]
        self._groups = [(file, group) for file, group in groups if file.footer.row_group(group).num_rows]
        self.sizes = [file.footer.row_group(group).num_rows for file, group in self._groups]
        self.block_names = [f"{file.path}, row group {group}" for file, group in self._groups]
        self.identity = identity_of({file.path: file.version for file in files})

    def read(self, block: int) -> Arrays | Sequence[tuple[Any, Any]]:
        """Read and decode a row group. Raises UsageError if a row cannot be used, or the file has changed."""
        (file, group), where = self._groups[block], self.block_names[block]
        with opened(self._filesystem, file.path, file.version) as handle:
            try:
                table = self._table(handle, file, group)
            except STORAGE_ERRORS:  # does the storage fail, or is the file damaged?
                content = pa.BufferReader(handle.read_at(handle.size(), 0))
                with in_one_line(f"{where} is damaged"):
                    table = self._table(content, file, group)
        if self._decode is not None:
            return of_rows(self._decode, table.to_pylist(), lambda row: f"{where}, row {row}")
        return arrays_of(table, self._columns, f"{where}, ")

    def _table(self, handle: Any, file: _File, group: int) -> pa.Table:
        return pq.ParquetFile(handle, metadata=file.footer, pre_buffer=True).read_row_group(group, self._columns)


class _File(NamedTuple):
    """A file as it was when its footer was read."""

    path: str
    version: str
    footer: pq.FileMetaData


def _index_of(schema: pa.Schema) -> list[Any]:
    """Return the columns of pandas' index; none if pandas' metadata are damaged."""
    with contextlib.suppress(ValueError, AttributeError):
        found = (schema.pandas_metadata or {}).get("index_columns")
        return found if isinstance(found, list) else []
    return []


def _opened(filesystem: fs.FileSystem, path: str) -> _File:
    with filesystem.open_input_file(path) as handle, in_one_line(f"{path} is not a whole Parquet file"):
        return _File(path, version_of(filesystem, path, handle), pq.read_metadata(handle))
