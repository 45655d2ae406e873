"""Data as they lie around, for any workload and for MNIST's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mnist_ray.errors import JobError, UsageError
from mnist_ray.mnist import MNIST
from mnist_ray.workload import sources
from mnist_ray.workload.data import Arrays, Data
from mnist_ray.workload.loading import load_data
from tests.conftest import mnist

NUM_TRAIN, NUM_TEST = 40, 10


@pytest.fixture(scope="module")
def digits(mnist_test: Arrays) -> Data:
    """A few images of each of five digits."""
    chosen = np.concatenate([np.flatnonzero(mnist_test.targets == digit)[:10] for digit in range(5)])
    rng = np.random.default_rng(0)
    rng.shuffle(chosen)
    images, labels = mnist_test.inputs[chosen], mnist_test.targets[chosen]
    return Data(Arrays(images[:NUM_TRAIN], labels[:NUM_TRAIN]), Arrays(images[NUM_TRAIN:], labels[NUM_TRAIN:]))


def write_pictures(folder: Path, part: Arrays) -> None:
    for number, (image, label) in enumerate(zip(part.inputs, part.targets, strict=True)):
        (folder / f"digit {label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"digit {label}" / f"{number}.png")


def as_csv(part: Arrays, header: bool = True) -> str:
    lines = [",".join(["label", *(f"pixel{number}" for number in range(784))])]
    for image, label in zip(part.inputs, part.targets, strict=True):
        lines.append(",".join(map(str, [label, *image.ravel()])))
    return "\n".join(lines) + "\n"


def pictures_in_two_folders(folder: Path, data: Data) -> None:
    write_pictures(folder / "train", data.train)  # type: ignore[arg-type]
    write_pictures(folder / "test", data.test)  # type: ignore[arg-type]


def pictures_in_one_folder(folder: Path, data: Data) -> None:
    both = zip(_both(data.train), _both(data.test), strict=True)
    write_pictures(folder, Arrays(*map(np.concatenate, both)))


def _both(part: Any) -> tuple[np.ndarray, np.ndarray]:
    return part.inputs, part.targets


def csv_files(folder: Path, data: Data) -> None:
    (folder / "train.csv").write_text(as_csv(data.train))  # type: ignore[arg-type]
    (folder / "test.csv").write_text(as_csv(data.test))  # type: ignore[arg-type]


def parquet_files(folder: Path, data: Data) -> None:
    from pyarrow import csv, parquet

    csv_files(folder, data)
    for name in ("train", "test"):
        parquet.write_table(csv.read_csv(folder / f"{name}.csv"), folder / f"{name}.parquet")
        (folder / f"{name}.csv").unlink()


def npz_file(folder: Path, data: Data) -> None:
    (x_train, y_train), (x_test, y_test) = _both(data.train), _both(data.test)
    np.savez(folder / "mnist.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


def npy_files(folder: Path, data: Data) -> None:
    for part in ("train", "test"):
        for x, values in zip("xy", _both(getattr(data, part)), strict=True):
            np.save(folder / f"{x}_{part}.npy", values)


def huggingface_dataset(folder: Path, data: Data) -> None:
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"digit {n}" for n in range(5)])}
    )
    parts = {}
    for part in ("train", "test"):
        images, labels = _both(getattr(data, part))
        rows = {"image": [Image.fromarray(image) for image in images], "label": labels.tolist()}
        parts[part] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(folder))


@pytest.mark.parametrize(
    ("write", "kind", "names"),
    [
        (pictures_in_two_folders, "pictures", [f"digit {n}" for n in range(5)]),
        (pictures_in_one_folder, "pictures", [f"digit {n}" for n in range(5)]),
        (csv_files, "table", [0, 1, 2, 3, 4]),
        (parquet_files, "table", [0, 1, 2, 3, 4]),
        (npz_file, "arrays", [0, 1, 2, 3, 4]),
        (npy_files, "arrays", [0, 1, 2, 3, 4]),
        (huggingface_dataset, "huggingface", [f"digit {n}" for n in range(5)]),
    ],
)
def test_mnists_data_dir_takes_digits_of_every_kind(
    write: Callable[[Path, Data], None], kind: str, names: list[Any], digits: Data, tmp_path: Path
) -> None:
    write(tmp_path, digits)
    assert sources.kind_of(tmp_path) == kind
    workload = MNIST(MNIST.Settings(data_dir=tmp_path))
    workload.source = mnist().source
    data = load_data(workload)
    assert workload.metadata["class_names"] == names
    assert isinstance(data.train, Arrays)
    assert isinstance(data.test, Arrays)
    assert (len(data.train), len(data.test)) == (NUM_TRAIN, NUM_TEST)
    assert data.name.startswith(tmp_path.name)

    def sorted_images(part: Any) -> list[bytes]:
        return sorted(
            bytes([target]) + image.tobytes() for image, target in zip(part.inputs, part.targets, strict=True)
        )

    both = [*sorted_images(data.train), *sorted_images(data.test)]
    assert sorted(both) == sorted([*sorted_images(digits.train), *sorted_images(digits.test)])
    if write is not pictures_in_one_folder:
        assert sorted_images(data.test) == sorted_images(digits.test)


def test_a_table_has_classes_where_the_workload_says_so(tmp_path: Path) -> None:
    (tmp_path / "cats.csv").write_text(
        "weight,height,kind\n" + "".join(f"{n},{n / 2},{'ab'[n % 2]}\n" for n in range(20))
    )
    data = sources.read(tmp_path / "cats.csv", as_classes=True)
    assert data.name == "cats.csv, a table of 2 columns to learn kind from"
    assert data.metadata == {"class_names": ["a", "b"]}
    assert isinstance(data.train, Arrays)
    assert isinstance(data.test, Arrays)
    assert (data.train.inputs.shape, data.train.inputs.dtype.name, len(data.test)) == ((16, 2), "float32", 4)
    assert set(data.train.targets) == {0, 1}


@pytest.mark.parametrize(("factor", "dtype"), [(1.5, "float32"), (1000, "int64")])
def test_targets_of_a_table_are_its_numbers_also_where_they_are_whole(
    factor: float, dtype: str, tmp_path: Path
) -> None:
    (tmp_path / "prices.csv").write_text("rooms,price\n" + "".join(f"{n},{n * factor}\n" for n in range(20)))
    prices = sources.read(tmp_path / "prices.csv")
    assert isinstance(prices.train, Arrays)
    assert (prices.train.targets.dtype.name, dict(prices.metadata)) == (dtype, {})
    np.testing.assert_allclose(prices.train.targets, prices.train.inputs[:, 0] * factor)
    rooms = sources.table(tmp_path / "prices.csv", target="rooms", as_classes=True)
    assert rooms.metadata == {"class_names": list(range(20))}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no data that are known; expected are: pictures in a folder for each class"),
        ({"a.csv": "x,label\n1,2\n", "b.csv": "x,label\n1,2\n"}, "holds several tables, but not train and test"),
        ({"a.csv": "x,label\n"}, "has no rows"),
        ({"a.csv": "x,label\nred,2\n"}, "column x is no numbers; leave it out, or turn it into numbers"),
        ({"a.csv": "x,label\n,2\n1,1\n"}, "column x has gaps, or values that are no numbers"),
        ({"a.csv": "label\n2\n"}, "has no column but label"),
        ({"a.csv": "x,label\n1,red\n"}, "label is no numbers; if these are classes, read it with as_classes=True"),
        ({"a.csv": "x,label\n1,2\n1,\n"}, "label has gaps, or values that are no numbers"),
        ({"train.csv": "x,label\n1,a\n", "test.csv": "y,label\n1,a\n"}, "has columns y, label; expected are x, label"),
    ],
)
def test_what_is_no_data_is_said_in_one_line(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as raised:
        sources.read(tmp_path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_class_of_the_test_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("x,label\n1,a\n")
    (tmp_path / "test.csv").write_text("x,label\n1,b\n")
    with pytest.raises(UsageError, match="the test has 'b', which the training has not"):
        sources.read(tmp_path, as_classes=True)


def test_damaged_files_are_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mnist.npz").write_bytes(b"PK no")
    with pytest.raises(JobError, match=r"cannot be read: "):
        sources.read(tmp_path)
    (tmp_path / "mnist.npz").unlink()
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(JobError, match=r"train\.parquet cannot be read: "):
        sources.read(tmp_path)


def test_images_of_another_size_are_no_digits(tmp_path: Path) -> None:
    images, labels = np.zeros((20, 32, 32), np.uint8), np.arange(20) % 10
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    with pytest.raises(UsageError, match="has examples of 32×32 numbers, not images of 28×28"):
        MNIST(MNIST.Settings(data_dir=tmp_path)).load_data()
