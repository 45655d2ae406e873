"""Ready-made data for ``load_data``: tables, folders of pictures (one folder per class), and Parquet in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mnist_ray.errors import JobError, UsageError, first_line
from mnist_ray.settings import path_of
from mnist_ray.workload.data import Arrays, Data
from mnist_ray.workload.order import Shuffled
from mnist_ray.workload.parquet import Parquet

if TYPE_CHECKING:
    from pandas import DataFrame

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
        for folder, part in zip(folders, _parted(len(folders[0])), strict=True):
            folder.samples = [folder.samples[index] for index in part]
    train, test = folders
    files = [file for folder in folders for file, _ in folder.samples]
    name = f"{place.name}, pictures of {len(classes)} classes"
    return Data(train, test, name=name, metadata={"class_names": classes}, files=files)


def table(
    table: str | Path | DataFrame,
    test: str | Path | DataFrame | None = None,
    *,
    target: str,
    columns: Sequence[str] | None = None,
    as_classes: bool = False,
) -> Data:
    """Read a table from a CSV or Parquet file, or take a ``DataFrame``. The inputs are (N, columns) float32.

    ``columns``: by default all but ``target``; the metadata have them. The column ``target`` has the targets, (N,),
    whole numbers or float32. With ``as_classes``, its values are names of classes: ``class_names`` in the metadata is
    their sorted list, and targets are indices of it. Without ``test``, a random fifth is the test set. Raises
    UsageError for gaps or strings.
    """
    import pandas

    frames = [_frame(each) for each in (table, test) if each is not None]
    columns = [name for name in frames[0] if name != target] if columns is None else list(columns)
    for frame in frames:
        if missing := [name for name in (*columns, target) if name not in frame]:
            raise UsageError(f"the table has no column {missing[0]}, only {', '.join(map(str, frame))}")
        _check_numbers(frame, columns if as_classes else [*columns, target])
    inputs = [frame[columns].to_numpy(np.float32) for frame in frames]
    targets, metadata = [frame[target].to_numpy() for frame in frames], dict[str, Any](columns=[*map(str, columns)])
    if as_classes:
        names = metadata["class_names"] = sorted(frames[0][target].dropna().unique().tolist())
        targets = [pandas.Index(names).get_indexer(values) for values in targets]
        for frame, numbers in zip(frames, targets, strict=True):
            if (numbers < 0).any():
                wrong = frame[target][numbers < 0].iloc[0]
                raise UsageError(f"column {target} has gaps, or a class that is only in the test set: {wrong}")
    targets = [values.astype(np.float32) if values.dtype.kind == "f" else values for values in targets]
    if test is None:
        inputs, targets = ([values[0][part] for part in _parted(len(inputs[0]))] for values in (inputs, targets))
    shown = Path(table).name if isinstance(table, (str, Path)) else "a table"
    train_set, test_set = map(Arrays, inputs, targets)
    return Data(train_set, test_set, name=f"{shown}, {len(columns)} columns to predict {target}", metadata=metadata)


def _frame(table: str | Path | DataFrame) -> DataFrame:
    import pandas

    if not isinstance(table, (str, Path)):
        return table
    file = path_of(table, "the data's path")
    try:
        return pandas.read_parquet(file) if file.suffix == ".parquet" else pandas.read_csv(file)
    except (OSError, ValueError) as error:  # both parsers raise ValueError
        raise JobError(f"{file} cannot be read: {first_line(error)}") from error


def _check_numbers(frame: DataFrame, names: Sequence[str]) -> None:
    texts = [name for name in names if frame[name].dtype.kind not in "biuf"]
    gaps = [name for name in names if name not in texts and not np.isfinite(frame[name].to_numpy(float)).all()]
    wrong = []
    if texts:
        call = f"pandas.get_dummies(table, columns={texts})"
        wrong.append(f"no numbers in {', '.join(texts)}: use {call}, or, for the target, as_classes=True")
    if gaps:
        wrong.append(f"gaps in {', '.join(gaps)}: use table.fillna(0), or dropna()")
    if wrong:
        raise UsageError(f"the table has {'; '.join(wrong)}; then pass the DataFrame, or name other columns=[…]")


def _parted(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of a random training set and test set."""
    order = Shuffled(number, [_TEST_SEED])[:]
    num_test = max(1, number // _TEST_PART)
    return np.sort(order[num_test:]), np.sort(order[:num_test])
