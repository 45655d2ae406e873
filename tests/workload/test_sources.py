"""Data as they lie around: pictures by class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnist_ray.errors import UsageError
from mnist_ray.workload import sources

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
