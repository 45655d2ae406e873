"""Data as they lie around: pictures by class, and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image

from mnist_ray.errors import JobError, UsageError
from mnist_ray.workload import sources
from mnist_ray.workload.data import Arrays

COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}


def write_pictures(folder: Path, number: int, names: tuple[str, ...] = ("blue", "red")) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(number):
            Image.new("RGB", (40, 30), COLOURS.get(name, (9, 9, 9))).save(folder / name / f"{index}.png")


@pytest.mark.parametrize("other", ["test", "val"])
def test_pictures_are_read_by_class_from_two_folders(tmp_path: Path, other: str) -> None:
    write_pictures(tmp_path / "train", 3)
    write_pictures(tmp_path / other, 1)
    data = sources.pictures(tmp_path, size=8)
    assert data.metadata == {"class_names": ["blue", "red"]}
    assert (len(data.train), len(data.test), len(data.files)) == (6, 2, 8)  # type: ignore[arg-type]
    for number, colour in enumerate(COLOURS.values()):
        pixels, target = data.test[number]  # type: ignore[index]
        assert target == number
        np.testing.assert_array_equal(pixels, np.broadcast_to(np.array(colour)[:, None, None], (3, 8, 8)))


def test_of_pictures_in_one_folder_a_fifth_is_the_test_and_grey_has_one_channel(tmp_path: Path) -> None:
    write_pictures(tmp_path / "all", 10)
    data = sources.pictures(tmp_path / "all", size=16, is_grey=True)
    assert (len(data.train), len(data.test)) == (16, 4)  # type: ignore[arg-type]
    assert data.train[0][0].shape == (1, 16, 16)  # type: ignore[index]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "Couldn't find any class folder"),
        ({"train": ("red",)}, "has only train/; it needs both train/ and test/"),
        ({"train": ("red",), "test": ("green",)}, "train/ and test/ differ in classes"),
    ],
)
def test_folders_that_hold_no_pictures_by_class_are_refused(
    parts: dict[str, tuple[str, ...]], message: str, tmp_path: Path
) -> None:
    for part, names in parts.items():
        write_pictures(tmp_path / part, 1, names)
    with pytest.raises(UsageError, match=message):
        sources.pictures(tmp_path)


def arrays(part: Any) -> Arrays:
    assert isinstance(part, Arrays)
    return part


CATS = pandas.DataFrame({"weight": range(20), "height": [n / 2 for n in range(20)], "kind": ["a", "b"] * 10})


@pytest.mark.parametrize("kind", ["csv", "parquet", "frame"])
def test_a_table_has_classes_if_the_workload_says_so(tmp_path: Path, kind: str) -> None:
    table: Any = CATS
    if kind != "frame":
        table = tmp_path / f"cats.{kind}"
        CATS.to_csv(table, index=False) if kind == "csv" else CATS.to_parquet(table)
    data = sources.table(table, target="kind", as_classes=True)
    shown = "a table" if kind == "frame" else f"cats.{kind}"
    assert data.name == f"{shown}, 2 columns to predict kind"
    assert data.metadata == {"columns": ["weight", "height"], "class_names": ["a", "b"]}
    train, test = arrays(data.train), arrays(data.test)
    assert (train.inputs.shape, train.inputs.dtype.name, len(test)) == ((16, 2), "float32", 4)
    np.testing.assert_array_equal(train.targets, train.inputs[:, 0] % 2)


@pytest.mark.parametrize(("factor", "dtype"), [(1.5, "float32"), (1000, "int64")])
def test_targets_of_a_table_are_its_numbers_also_if_they_are_whole(factor: float, dtype: str) -> None:
    table = pandas.DataFrame({"rooms": range(20), "year": 1, "price": [n * factor for n in range(20)]})
    data = sources.table(table, table[:5], target="price", columns=["rooms"])
    train = arrays(data.train)
    assert (len(train), len(arrays(data.test)), train.targets.dtype.name) == (20, 5, dtype)
    assert data.metadata == {"columns": ["rooms"]}
    np.testing.assert_allclose(train.targets, train.inputs[:, 0] * factor)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": [1]}, "the table has no column y, only x"),
        (
            {"x": ["red", "blue"], "y": [2, 1], "z": [None, 1.0], "w": ["a", "b"]},
            r"^the table has no numbers in x, w: use pandas.get_dummies\(table, columns=\['x', 'w'\]\), or, .*; "
            r"gaps in z: use table.fillna\(0\), or dropna\(\); then pass the DataFrame, or name other columns=\[…\]$",
        ),
        ({"x": [1.0], "y": ["red"]}, "the table has no numbers in y: .*, or, for the target, as_classes=True; then"),
        ({"x": [1, 1], "y": [2, float("inf")]}, "the table has gaps in y: use"),
    ],
)
def test_what_is_no_table_of_numbers_is_refused_with_what_to_write(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sources.table(pandas.DataFrame(columns), target="y")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"target": "race"}, "no column race, only weight,"), ({"columns": ["size"]}, "no column size, only weight,")],
)
def test_a_column_that_is_not_there_is_refused_with_those_that_are(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sources.table(CATS, **{"target": "kind", "as_classes": True, **wrong})


@pytest.mark.parametrize(("name", "shown"), [("b", "b"), (None, "None")])
def test_a_class_of_the_test_alone_and_a_gap_are_refused(name: Any, shown: str) -> None:
    frames = [pandas.DataFrame({"x": [1], "y": [each]}) for each in ("a", name)]
    with pytest.raises(UsageError, match=f"column y has gaps, or a class that is only in the test set: {shown}"):
        sources.table(*frames, target="y", as_classes=True)


@pytest.mark.parametrize("name", ["lost.csv", "bad.parquet", "bad.csv"])
def test_files_that_cannot_be_read_are_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "bad.csv").write_text('a,b\n"1,2,3\n')
    with pytest.raises(JobError, match=rf"{name} cannot be read: ") as raised:
        sources.table(tmp_path / name, target="y")
    assert "\n" not in str(raised.value)
