import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest

from mnist_ray.data.data import Arrays
from mnist_ray.errors import JobError
from mnist_ray.mnist import idx
from tests.conftest import idx_bytes, write_data_set


def tiny(num_images: int = 3, num_classes: int = 2) -> Arrays:
    images = np.arange(num_images * 28 * 28, dtype=np.uint8).reshape(num_images, 28, 28)
    return Arrays(images, np.arange(num_images, dtype=np.uint8) % num_classes)


def test_the_embedded_data_set_is_the_whole_of_mnist(mnist_test: Arrays) -> None:
    train = idx.load("train")
    arrays = (train.inputs, train.targets, mnist_test.inputs, mnist_test.targets)
    assert [array.shape for array in arrays] == [(60_000, 28, 28), (60_000,), (10_000, 28, 28), (10_000,)]
    assert [hashlib.sha256(idx_bytes(array)).hexdigest()[:16] for array in arrays] == [
        "ba891046e6505d7a",
        "65a50cbbf4e906d7",
        "0fa7898d509279e4",
        "ff7bcfd416de3373",
    ]


@pytest.mark.parametrize("gzipped", [False, True])
def test_a_data_set_is_read_gzipped_or_not(tmp_path: Path, gzipped: bool) -> None:
    write_data_set(tmp_path, tiny(3), tiny(2), gzipped=gzipped)
    for split, expected in (("train", tiny(3)), ("test", tiny(2))):
        found = idx.load(split, tmp_path)
        np.testing.assert_array_equal(found.inputs, expected.inputs)
        np.testing.assert_array_equal(found.targets, expected.targets)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, idx_bytes(tiny().inputs)[:-1], "should have 2,368 bytes according to its header, but has 2,367"),
        (IMAGES, idx_bytes(tiny().inputs)[:9], "or ends within its header"),
        (IMAGES, b"", "is not the IDX file expected"),
        (IMAGES, idx_bytes(tiny().targets), "starts with 00 00 08 01, not 00 00 08 03"),
        (IMAGES, idx_bytes(np.zeros((3, 32, 28), np.uint8)), "has images of 32×28, not 28×28"),
        (IMAGES, idx_bytes(tiny(4).inputs), "has 4 train images but 3 labels"),
        (LABELS, idx_bytes(np.array([0, 1, 10], np.uint8)), "has label 10; the classes are 0 to 9"),
        (f"{LABELS}.gz", gzip.compress(idx_bytes(tiny().targets), mtime=0)[:-9], "is a damaged gzip file"),
        (f"{LABELS}.gz", b"no gzip at all", "is a damaged gzip file"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_data_set(tmp_path, tiny(), tiny())
    (tmp_path / name.removesuffix(".gz")).unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(JobError, match=message):
        idx.load("train", tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(JobError, match=r"\.gz cannot be read: No such file or directory$"):
        idx.load("train", tmp_path)
