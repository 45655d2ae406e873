import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest

from mnist_ray.errors import JobError, UsageError
from mnist_ray.mnist import idx
from mnist_ray.workload.data import Arrays
from tests.conftest import idx_bytes, write_data_set


def tiny(num_images: int = 3, num_classes: int = 2) -> Arrays:
    images = np.arange(num_images * 28 * 28, dtype=np.uint8).reshape(num_images, 28, 28)
    return Arrays(images, np.arange(num_images, dtype=np.uint8) % num_classes)


def assert_equal(split: Arrays, other: Arrays) -> None:
    np.testing.assert_array_equal(split.inputs, other.inputs)
    np.testing.assert_array_equal(split.targets, other.targets)


def test_the_embedded_data_set_is_the_whole_of_mnist(mnist_test: Arrays) -> None:
    train = idx.load("train")
    assert train.inputs.shape == (60_000, 28, 28)
    assert mnist_test.inputs.shape == (10_000, 28, 28)
    assert train.targets[:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(mnist_test.targets).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_a_tampered_embedded_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(idx.SHIPPED, tmp_path, dirs_exist_ok=True)
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(gzip.decompress(labels.read_bytes()))
    content[8] ^= 1
    labels.write_bytes(gzip.compress(bytes(content)))
    monkeypatch.setattr(idx, "SHIPPED", tmp_path)
    with pytest.raises(JobError, match="is not the file that was shipped"):
        idx.load("test")


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("below", ["", "raw", "FashionMNIST/raw"])
def test_a_data_set_is_found_in_each_layout(tmp_path: Path, gzipped: bool, below: str) -> None:
    write_data_set(tmp_path / below, tiny(3), tiny(2), gzipped=gzipped)
    assert_equal(idx.load("train", tmp_path), tiny(3))
    assert_equal(idx.load("test", tmp_path), tiny(2))


def test_a_folder_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="--data-dir /nowhere is not a folder"):
        idx.load("train", Path("/nowhere"))


def test_an_empty_folder_is_refused_with_the_names_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lacks train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k"):
        idx.load("train", tmp_path)


def test_a_folder_with_two_data_sets_is_refused(tmp_path: Path) -> None:
    for name in ("MNIST", "KMNIST"):
        write_data_set(tmp_path / name / "raw", tiny(), tiny())
    with pytest.raises(UsageError, match="holds several data sets; name one"):
        idx.load("train", tmp_path)


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data_set(tmp_path, tiny(), tiny())

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(JobError, match="train-images-idx3-ubyte cannot be read: Permission denied"):
        idx.load("train", tmp_path)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, idx_bytes(tiny().inputs)[:-1], "should have 2,368 bytes by its header, but has 2,367"),
        (IMAGES, idx_bytes(tiny().inputs) + b"0", "should have 2,368 bytes by its header, but has 2,369"),
        (IMAGES, idx_bytes(tiny().inputs)[:9], "ends within its header"),
        (IMAGES, b"", "is not the IDX file expected"),
        (IMAGES, idx_bytes(tiny().targets), "starts with 00 00 08 01, not 00 00 08 03"),
        (IMAGES, idx_bytes(np.zeros((3, 32, 28), np.uint8)), "has images of 32×28, not 28×28"),
        (IMAGES, idx_bytes(tiny(4).inputs), "has 4 train images but 3 labels"),
        (LABELS, idx_bytes(np.array([0, 1, 10], np.uint8)), "has label 10; the classes are 0 to 9"),
        (LABELS, b"\x80\x04K\x01.", "is not the IDX file expected"),
        (f"{LABELS}.gz", gzip.compress(idx_bytes(tiny().targets))[:-9], "is a damaged gzip file"),
        (f"{LABELS}.gz", b"no gzip at all", "is a damaged gzip file"),
        (f"{LABELS}.gz", gzip.compress(idx_bytes(tiny().targets))[:10] + b"\xff" * 30, "is a damaged gzip file"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_data_set(tmp_path, tiny(), tiny())
    (tmp_path / name.removesuffix(".gz")).unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(JobError, match=message):
        idx.load("train", tmp_path)


def test_a_data_set_without_images_is_refused(tmp_path: Path) -> None:
    write_data_set(tmp_path, tiny(), tiny(0))
    with pytest.raises(JobError, match="holds no images"):
        idx.load("test", tmp_path)
