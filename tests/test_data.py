import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from mnist_ray import data
from mnist_ray.config import DataConfig
from mnist_ray.data import Batch, BatchDataset, ShardedBatchSampler, Split, epoch_loader
from mnist_ray.errors import JobError, UsageError
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


def shards(num_images: int, batch_size: int, world_size: int, epoch: int = 0, first_step: int = 0) -> list[list]:
    """Return each rank's slices of an epoch."""
    return [
        list(
            ShardedBatchSampler(
                num_images,
                batch_size,
                seed=3,
                epoch=epoch,
                rank=rank,
                world_size=world_size,
                first_step=first_step,
            )
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("batch_size", [1, 2, 8, 33, 100])
@pytest.mark.parametrize("num_images", [1, 7, 100, 101])
def test_shards_partition_every_epoch_into_the_same_global_batches(
    num_images: int, batch_size: int, world_size: int
) -> None:
    alone = shards(num_images, batch_size, 1)[0]
    for epoch in range(2):
        by_rank = shards(num_images, batch_size, world_size, epoch)
        assert {len(slices) for slices in by_rank} == {data.num_steps(num_images, batch_size)}
        steps = list(zip(*by_rank, strict=True))
        batches = [np.concatenate([indices for indices, _ in step]) for step in steps]
        assert sorted(np.concatenate(batches)) == list(range(num_images))
        for step, batch in zip(steps, batches, strict=True):
            assert {size for _, size in step} == {len(batch)}
            lengths = [len(indices) for indices, _ in step]
            assert max(lengths) - min(lengths) <= 1
        if epoch == 0:
            for batch, (expected, _) in zip(batches, alone, strict=True):
                np.testing.assert_array_equal(batch, expected)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [
        next(iter(ShardedBatchSampler(500, 500, seed=seed, epoch=epoch)))[0].tolist()
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_a_sampler_goes_on_at_any_step() -> None:
    whole = shards(100, 8, 2)[1]
    rest = shards(100, 8, 2, first_step=5)[1]
    assert len(rest) == len(whole) - 5
    for (indices, _), (expected, _) in zip(rest, whole[5:], strict=True):
        np.testing.assert_array_equal(indices, expected)


def test_the_loader_gives_the_sampled_images_in_whole_batches() -> None:
    split = tiny(10, num_classes=10)
    split.images.setflags(write=False)
    sampler = ShardedBatchSampler(10, 4, seed=0, epoch=0)
    loader = epoch_loader(BatchDataset(split, torch.device("cpu")), sampler)
    batches = list(loader)
    assert [batch.global_size for batch in batches] == [4, 4, 2]
    for batch, (indices, _) in zip(batches, sampler, strict=True):
        assert isinstance(batch, Batch)
        assert batch.labels.tolist() == indices.tolist()
        np.testing.assert_array_equal(batch.images.numpy(), split.images[indices])
    assert len(loader) == 3
