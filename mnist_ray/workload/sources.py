"""Data as they lie around: pictures in folders by class, tables, NumPy files, Hugging Face datasets.

A workload's ``load_data`` may return what ``read`` finds at a path, or call the function of one kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mnist_ray.errors import JobError, UsageError, first_line
from mnist_ray.settings import path_of
from mnist_ray.workload.data import Arrays, Data
from mnist_ray.workload.order import Shuffled

if TYPE_CHECKING:
    from torch.utils.data import Dataset

EXPECTED = (
    "pictures in a folder for each class, or train/ and test/ with these; train.csv and test.csv, or one table, also "
    ".parquet; x_train.npy, y_train.npy, x_test.npy and y_test.npy, or an .npz file with these; a Hugging Face dataset "
    "as save_to_disk writes it"
)
"""What ``read`` knows."""
TARGETS = ("label", "target", "class", "y")
"""Names of a table's column that is to be learned, where nobody says which it is; else it is the last."""
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
"""How the names of pictures end that are taken from a folder."""
_TABLES = frozenset({".csv", ".parquet"})
_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_TEST_PART, _TEST_SEED = 5, 53  # one of so many examples, drawn at random, is to test where the data are not parted


def read(
    path: str | Path, *, size: int = 64, is_grey: bool = False, target: str | None = None, as_classes: bool = False
) -> Data:
    """Return the data at a path, of whichever kind they are; the others' arguments are as the functions below say.

    Raises UsageError where there are none, and JobError where they cannot be read.
    """
    place = path_of(path, "the data's path")
    kind = kind_of(place)
    if kind == "pictures":
        return pictures(place, size=size, is_grey=is_grey)
    if kind == "table":
        return table(place, target=target, as_classes=as_classes)
    if kind == "arrays":
        return arrays(place)
    if kind == "huggingface":
        return huggingface(place, size=size, is_grey=is_grey, target=target)
    raise UsageError(f"{place} holds no data that are known; expected are: {EXPECTED}")


def kind_of(place: Path) -> str | None:
    """Return which kind of data a path holds: pictures, table, arrays or huggingface; None where it is none of these.

    Raises UsageError where it cannot be read.
    """
    try:
        if place.is_file():
            return "table" if place.suffix in _TABLES else "arrays" if place.suffix == ".npz" else None
        if not place.is_dir():
            raise UsageError(f"{place} is neither a file nor a folder")
        names = {entry.name for entry in place.iterdir()}
        if "dataset_dict.json" in names:
            return "huggingface"
        if any(Path(name).suffix in _TABLES for name in names):
            return "table"
        if all(f"{name}.npy" in names for name in _ARRAYS) or any(name.endswith(".npz") for name in names):
            return "arrays"
        roots = [place / "train"] if (place / "train").is_dir() else [place]
        classes = [folder for root in roots for folder in root.iterdir() if folder.is_dir()]
        has_pictures = any(file.suffix.lower() in PICTURES for folder in classes for file in folder.iterdir())
        return "pictures" if has_pictures else None
    except OSError as error:
        raise UsageError(f"{place} cannot be read: {error.strerror}") from error


def pictures(place: str | Path, *, size: int = 64, is_grey: bool = False) -> Data:
    """Return pictures that lie in a folder for each class, as torchvision's ``ImageFolder`` takes them.

    Each is read when it is needed, cut to a square and scaled: (3, ``size``, ``size``) uint8, or (1, …) in grey. There
    may be train/ and test/ (or val/) with such folders; else a fifth, drawn at random, is to test.
    """
    from torch.utils.data import Subset
    from torchvision.datasets import ImageFolder

    place = path_of(place, "the data's path")
    open_folder = functools.partial(ImageFolder, transform=_Square(size, is_grey))
    try:
        if not (place / "train").is_dir():
            whole = open_folder(place)
            train, test = (Subset(whole, part.tolist()) for part in _parted(len(whole)))
            files, classes = [file for file, _ in whole.samples], whole.classes
        else:
            parted = [open_folder(place / "train"), open_folder(_other_part(place))]
            if parted[0].classes != parted[1].classes:
                raise UsageError(f"{place}: train/ and {_other_part(place).name}/ have other classes")
            train, test = parted
            files, classes = [file for part in parted for file, _ in part.samples], parted[0].classes
    except FileNotFoundError as error:
        raise UsageError(f"{place}: {first_line(error)}") from error
    name = f"{place.name}, pictures of {len(classes)} classes"
    return Data(train, test, name=name, metadata={"class_names": classes}, files=files)


def _other_part(place: Path) -> Path:
    for name in ("test", "val", "valid", "validation"):
        if (place / name).is_dir():
            return place / name
    raise UsageError(f"{place} has a folder train/, but no test/ beside it")


@dataclass(frozen=True)
class _Square:
    """Turns a Pillow image into (C, size, size) uint8: its middle, scaled."""

    size: int
    is_grey: bool

    def __call__(self, picture: Any) -> np.ndarray:
        from PIL import ImageOps

        fitted = ImageOps.fit(picture.convert("L" if self.is_grey else "RGB"), (self.size, self.size))
        pixels = np.asarray(fitted)
        return pixels[None] if self.is_grey else pixels.transpose(2, 0, 1)


def table(place: str | Path, *, target: str | None = None, as_classes: bool = False) -> Data:
    """Return a table, CSV or Parquet: numbers of all columns but ``target`` are the inputs, (N, columns) float32.

    The targets are the numbers of the column ``target``, (N,): whole ones, or float32. With ``as_classes`` its values,
    texts or numbers, are names of classes: the targets are their places in sorted order, from 0 on, and
    ``class_names`` is a fact. There may be train.* and test.*; else a fifth of the one table, drawn at random, is to
    test. Raises UsageError if a column has gaps, or is not numbers.
    """
    place = path_of(place, "the data's path")
    files = _parts_of_table(place)
    tables = [_read_table(file) for file in files]
    names = list(tables[0])
    target = target or next((name for name in TARGETS if name in names), names[-1])
    for file, columns in zip(files, tables, strict=True):
        if list(columns) != names or target not in names:
            raise UsageError(f"{file} has columns {', '.join(columns)}; expected are {', '.join(names)} with {target}")
    inputs = [_numbers(file, columns, target) for file, columns in zip(files, tables, strict=True)]
    targets, metadata = [columns[target] for columns in tables], dict[str, Any]()
    if as_classes:
        targets, metadata = _numbered(targets, f"{place}: {target}")
    for values in targets:
        if values.dtype.kind not in "biuf":
            raise UsageError(f"{place}: {target} is no numbers; if these are classes, read it with as_classes=True")
        if not np.isfinite(values).all():
            raise UsageError(f"{place}: {target} has gaps, or values that are no numbers")
    targets = [values.astype(np.float32) if values.dtype.kind == "f" else values for values in targets]
    if len(files) == 1:
        inputs, targets = ([values[0][part] for part in _parted(len(inputs[0]))] for values in (inputs, targets))
    shown = f"{place.name}, a table of {len(names) - 1} columns to learn {target} from"
    train, test = map(Arrays, inputs, targets)
    return Data(train, test, name=shown, metadata=metadata)


def _parts_of_table(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    found = sorted(file for file in place.iterdir() if file.suffix in _TABLES)
    by_name = {file.stem: file for file in found}
    if "train" in by_name and "test" in by_name:
        return [by_name["train"], by_name["test"]]
    if len(found) != 1:
        raise UsageError(f"{place} holds several tables, but not train and test: {', '.join(f.name for f in found)}")
    return found


def _read_table(file: Path) -> dict[str, np.ndarray]:
    import pyarrow
    from pyarrow import csv, parquet

    try:
        read: Callable[[Path], Any] = csv.read_csv if file.suffix == ".csv" else parquet.read_table
        columns = read(file)
        if columns.num_rows == 0:
            raise UsageError(f"{file} has no rows")
        return {name: columns[name].to_numpy() for name in columns.column_names}
    except (OSError, pyarrow.ArrowException) as error:
        raise JobError(f"{file} cannot be read: {first_line(error)}") from error


def _numbers(file: Path, columns: Mapping[str, np.ndarray], target: str) -> np.ndarray:
    inputs = {name: values for name, values in columns.items() if name != target}
    if not inputs:
        raise UsageError(f"{file} has no column but {target}")
    for name, values in inputs.items():
        if values.dtype.kind not in "biuf":
            raise UsageError(f"{file}: column {name} is no numbers; leave it out, or turn it into numbers")
        if not np.isfinite(values).all():
            raise UsageError(f"{file}: column {name} has gaps, or values that are no numbers")
    return np.stack(list(inputs.values()), axis=1).astype(np.float32)


def _numbered(parts: Sequence[np.ndarray], place: str) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Return the classes of each part by their numbers, and their names as a fact."""
    if any(value is None or value != value for part in parts for value in part.tolist()):  # NaN differs from itself
        raise UsageError(f"{place} has gaps")
    classes = sorted(set(parts[0].tolist()))
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = next((value for part in parts for value in part.tolist() if value not in numbers), None)
    if unknown is not None:
        raise UsageError(f"{place}: the test has {unknown!r}, which the training has not")
    return [np.array([numbers[value] for value in part.tolist()]) for part in parts], {"class_names": classes}


def arrays(place: str | Path) -> Data:
    """Return NumPy's files: x_train.npy, y_train.npy, x_test.npy and y_test.npy, or an .npz file that holds these.

    The former are mapped into memory, and may be larger than it.
    """
    place = path_of(place, "the data's path")
    npz = [place] if place.is_file() else sorted(place.glob("*.npz"))
    try:
        if len(npz) == 1:
            with np.load(npz[0]) as held:
                lacking = [name for name in _ARRAYS if name not in held]
                if lacking:
                    raise UsageError(f"{npz[0]} lacks {', '.join(lacking)}; it has {', '.join(held) or 'nothing'}")
                x_train, y_train, x_test, y_test = (held[name] for name in _ARRAYS)
        elif npz:
            raise UsageError(f"{place} holds several .npz files; name one: {', '.join(file.name for file in npz)}")
        else:
            x_train, y_train, x_test, y_test = (np.load(place / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
    except (OSError, ValueError) as error:
        raise JobError(f"{place} cannot be read: {first_line(error)}") from error
    return Data(Arrays(x_train, y_train), Arrays(x_test, y_test), name=f"{place.name}, NumPy arrays")


def huggingface(place: str | Path, *, size: int = 64, is_grey: bool = False, target: str | None = None) -> Data:
    """Return a dataset that Hugging Face's ``save_to_disk`` has written, with train and test: pip install datasets.

    Images become what ``pictures`` makes of them; the target is the column ``target``, else the one that holds class
    labels, or the last.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError("a Hugging Face dataset needs more packages: pip install datasets") from error
    place = path_of(place, "the data's path")
    held = datasets.load_from_disk(str(place))
    other = next((name for name in ("test", "validation") if name in held), None)
    if "train" not in held or other is None:
        raise UsageError(f"{place} lacks train or test; it has {', '.join(held)}")
    features = held["train"].features
    labelled = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    target = target or next(iter(labelled), list(features)[-1])
    inputs = [name for name in features if name != target]
    if len(inputs) != 1:
        raise UsageError(f"{place} has the columns {', '.join(features)}; keep one beside {target}, by select_columns")
    metadata = {"class_names": features[target].names} if target in labelled else {}
    square = _Square(size, is_grey)
    train, test = (cast("Dataset", _Rows(held[part], inputs[0], target, square)) for part in ("train", other))
    files = [file["filename"] for part in ("train", other) for file in held[part].cache_files]
    return Data(train, test, name=f"{place.name}, a Hugging Face dataset", metadata=metadata, files=files)


@dataclass(frozen=True)
class _Rows:
    """A Hugging Face dataset as pairs (input, target)."""

    rows: Any
    inputs: str
    target: str
    to_pixels: _Square

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
        row = self.rows[int(index)]
        value = row[self.inputs]
        return (self.to_pixels(value) if hasattr(value, "convert") else np.asarray(value)), row[self.target]


def _parted(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which of some examples are to train on, and which to test, where nobody has parted them."""
    order = Shuffled(number, [_TEST_SEED])[:]
    num_test = max(1, number // _TEST_PART)
    return np.sort(order[num_test:]), np.sort(order[:num_test])
