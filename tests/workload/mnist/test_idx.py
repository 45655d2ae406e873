import gzip
from pathlib import Path

import numpy as np
import pytest

from mnist_ray.config import DataConfig
from mnist_ray.errors import JobError, UsageError
from mnist_ray.workload.mnist import idx as data
from mnist_ray.workload.mnist.idx import Split
from tests.conftest import idx_bytes, write_data_set


def tiny(num_images: int = 3, num_classes: int = 2) -> Split:
    images = np.arange(num_images * 28 * 28, dtype=np.uint8).reshape(num_images, 28, 28)
    return Split(images, np.arange(num_images, dtype=np.uint8) % num_classes)


def assert_equal(split: Split, other: Split) -> None:
    np.testing.assert_array_equal(split.images, other.images)
    np.testing.assert_array_equal(split.labels, other.labels)


def test_the_embedded_data_set_is_the_whole_of_mnist(mnist_test: Split) -> None:
    train = data.find(DataConfig()).load("train")
    assert train.images.shape == (60_000, 28, 28)
    assert mnist_test.images.shape == (10_000, 28, 28)
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(mnist_test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_a_tampered_embedded_file_is_refused(tmp_path: Path) -> None:
    source = data.find(DataConfig())
    content = bytearray(gzip.decompress((source.folder / "t10k-labels-idx1-ubyte.gz").read_bytes()))
    content[8] ^= 1
    for path in source.folder.glob("t10k-images*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(JobError, match="is not the file that was shipped"):
        data.Source("mnist", tmp_path, source.sha256).load("test")


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("below", ["", "raw", "FashionMNIST/raw"])
def test_a_data_set_is_found_in_each_layout(tmp_path: Path, gzipped: bool, below: str) -> None:
    write_data_set(tmp_path / below, tiny(3), tiny(2), gzipped=gzipped)
    source = data.find(DataConfig(data_dir=str(tmp_path)))
    assert_equal(source.load("train"), tiny(3))
    assert_equal(source.load("test"), tiny(2))


def test_a_downloaded_data_set_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_CACHE", tmp_path)
    write_data_set(tmp_path / "KMNIST" / "raw", tiny(3), tiny(2))
    source = data.find(DataConfig(dataset="kmnist"))
    assert source.name == "kmnist"
    assert_equal(source.load("test"), tiny(2))


def test_a_failed_download_is_one_line_that_names_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("Error downloading\nmore")

    monkeypatch.setattr(data, "_CACHE", tmp_path)
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", fail)
    with pytest.raises(JobError, match=r"cannot download FashionMNIST into .*: Error downloading; .* --data-dir"):
        data.find(DataConfig(dataset="fashion-mnist"))


def test_a_folder_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="--data-dir /nowhere is not a folder"):
        data.find(DataConfig(data_dir="/nowhere"))


def test_an_empty_folder_is_refused_with_the_names_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lacks train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k"):
        data.find(DataConfig(data_dir=str(tmp_path)))


def test_a_folder_with_two_data_sets_is_refused(tmp_path: Path) -> None:
    for name in ("MNIST", "KMNIST"):
        write_data_set(tmp_path / name / "raw", tiny(), tiny())
    with pytest.raises(UsageError, match="holds several data sets; name one"):
        data.find(DataConfig(data_dir=str(tmp_path)))


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data_set(tmp_path, tiny(), tiny())

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(JobError, match="train-images-idx3-ubyte cannot be read: Permission denied"):
        data.find(DataConfig(data_dir=str(tmp_path))).load("train")


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, idx_bytes(tiny().images)[:-1], "should have 2,368 bytes by its header, but has 2,367"),
        (IMAGES, idx_bytes(tiny().images) + b"0", "should have 2,368 bytes by its header, but has 2,369"),
        (IMAGES, idx_bytes(tiny().images)[:9], "ends within its header"),
        (IMAGES, b"", "is not the IDX file expected"),
        (IMAGES, idx_bytes(tiny().labels), "starts with 00 00 08 01, not 00 00 08 03"),
        (IMAGES, idx_bytes(np.zeros((3, 32, 28), np.uint8)), "has images of 32×28, not 28×28"),
        (IMAGES, idx_bytes(tiny(4).images), "has 4 train images but 3 labels"),
        (LABELS, idx_bytes(np.array([0, 1, 10], np.uint8)), "has label 10; the classes are 0 to 9"),
        (LABELS, b"\x80\x04K\x01.", "is not the IDX file expected"),
        (f"{LABELS}.gz", gzip.compress(idx_bytes(tiny().labels))[:-9], "is a damaged gzip file"),
        (f"{LABELS}.gz", b"no gzip at all", "is a damaged gzip file"),
        (f"{LABELS}.gz", gzip.compress(idx_bytes(tiny().labels))[:10] + b"\xff" * 30, "is a damaged gzip file"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_data_set(tmp_path, tiny(), tiny())
    (tmp_path / name.removesuffix(".gz")).unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(JobError, match=message):
        data.find(DataConfig(data_dir=str(tmp_path))).load("train")


def test_a_data_set_without_images_is_refused(tmp_path: Path) -> None:
    write_data_set(tmp_path, tiny(), tiny(0))
    with pytest.raises(JobError, match="holds no images"):
        data.find(DataConfig(data_dir=str(tmp_path))).load("test")


def test_hold_out_parts_the_images_without_regard_to_their_order() -> None:
    split = Split(np.zeros((1000, 28, 28), np.uint8), np.repeat(np.arange(10, dtype=np.uint8), 100))
    split.images[:, 0, 0], split.images[:, 0, 1] = np.arange(1000) % 256, np.arange(1000) // 256
    train, validation = data.hold_out(split, 200)
    numbers = [part.images[:, 0, 0] + 256 * part.images[:, 0, 1].astype(int) for part in (train, validation)]
    assert sorted(np.concatenate(numbers)) == list(range(1000))
    np.testing.assert_array_equal(validation.labels, numbers[1] // 100)
    assert (np.bincount(validation.labels, minlength=10) > 5).all(), "images sorted by label were not mixed"
