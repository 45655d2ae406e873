"""Batches and random numbers, which are those of one process; transforms of examples' inputs."""

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from mnist_ray.cluster.remote_data import share
from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import Batches, batch_loader, order_of
from mnist_ray.data.data import Split, Splits
from mnist_ray.data.sampler import ShardedBatchSampler
from mnist_ray.data.splits import Fold, splits_of, subset
from mnist_ray.errors import ExampleError
from mnist_ray.workload import Arrays, Blocks, Data, Streamed, Workload, sources

CPU = torch.device("cpu")
CONFIG = TrainConfig(batch_size=8, num_epochs=2, num_streams=4)
NUMBERS = np.arange(40, dtype=np.float32)


FIVES: Any = [(5, 0)] * 9


def pairs(number: int = 40) -> Any:
    return [(np.float32(index), index) for index in range(number)]


class OfArrays(Blocks):
    sizes = (10,) * 4

    def read(self, block: int) -> Arrays:
        rows = NUMBERS[10 * block : 10 * block + 10]
        return Arrays(rows, rows.astype(int))


class OfPairs(OfArrays):
    def read(self, block: int) -> Any:
        return pairs()[10 * block : 10 * block + 10]


def noisy(value: Any) -> Tensor:
    """Return the value and a random number of each generator."""
    return torch.tensor([value, torch.rand(()), np.random.random(), random.random()])


def minus(value: Any) -> Any:
    return -value


def seen(split: Split, rank: int = 0, world_size: int = 1, first_step: int = 0, num_processes: int = 0) -> list[Any]:
    """Return the rows that a rank sees in each step from ``first_step`` on, as the training reads them."""
    batches = Batches(split, CPU)
    batches.read_ahead(CONFIG, first_step, rank, world_size)
    found, num_epochs = [], 1 if split.is_stream else CONFIG.num_epochs
    for number in range(first_step // 5, num_epochs):
        batches.seed = 100 + number
        first = max(0, first_step - 5 * number)
        order = order_of(split, CONFIG, number)
        sampler = ShardedBatchSampler(len(split), 8, CONFIG.seed, number, rank, world_size, first, order=order)
        steps = itertools.islice(batch_loader(batches, sampler, CPU, num_processes), 5 - first)
        found += [[] if batch.is_filler else batch.inputs.tolist() for batch in steps]
    return found


class Drawing(Dataset[Any]):
    """Draws random numbers itself."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return noisy(index), index


WEIGHTS = np.repeat([3.0, 1.0], 20)
STREAM: Any = Streamed(lambda: iter(pairs()))


@pytest.mark.parametrize(
    ("examples", "more"),
    [
        (Arrays(NUMBERS, NUMBERS), {"train_transform": noisy}),
        (Arrays(NUMBERS, NUMBERS), {"train_transform": noisy, "weights": WEIGHTS}),
        (Arrays(NUMBERS[:, None], NUMBERS), {"weights": WEIGHTS}),
        (Drawing(), {}),
        (Drawing(), {"weights": WEIGHTS}),
        (pairs(), {"train_transform": noisy}),
        (OfArrays(), {"train_transform": noisy}),
        (OfArrays(), {}),
        (OfPairs(), {"train_transform": noisy}),
        (STREAM, {"train_transform": noisy}),
    ],
    ids=[
        *("arrays", "weighted arrays", "arrays as a whole", "drawing", "weighted", "dataset", "blocks of arrays"),
        *("blocks as a whole", "blocks of pairs", "stream"),
    ],
)
def test_batches_and_random_numbers_are_those_of_one_process(examples: Any, more: dict[str, Any]) -> None:
    train = splits_of(Data(examples, pairs(4), pairs(4), **more), None).train
    whole = seen(train)
    rows = [tuple(np.ravel(row)) for step in whole for row in step]
    assert {row[0] for row in rows} == {*range(40)} or "weights" in more
    if len(rows[0]) == 4:
        assert len({row[1:] for row in rows}) == len(rows), "each example has its own in each pass, or each time"
    assert seen(train, num_processes=2) == whole
    for world_size, first_step in ((2, 0), (3, 3)):
        ranks = [seen(train, rank, world_size, first_step) for rank in range(world_size)]
        assert [[*itertools.chain(*parts)] for parts in zip(*ranks, strict=True)] == whole[first_step:]


def signs(splits: Splits) -> list[set[int]]:
    """Return the signs of the inputs of each split, as batches and as single examples."""
    found = []
    for split in (splits.train, splits.validation, splits.test):
        inputs = Batches(split, CPU)[next(iter(ShardedBatchSampler(len(split), 40, 0, 0)))].inputs
        assert sorted(inputs.tolist()) == sorted(float(split[index][0]) for index in range(len(split)))
        found.append({int(sign) for sign in inputs.sign()})
    return found


@pytest.mark.parametrize("examples", [Arrays(NUMBERS + 1, NUMBERS), [(index + 1, 0) for index in range(40)]])
def test_examples_held_out_are_not_transformed_as_for_training(examples: Any) -> None:
    data = Data(examples, FIVES, train_transform=minus)
    assert signs(splits_of(data, 10)) == [{-1}, {1}, {1}]
    assert signs(splits_of(data, 10, Fold(0, 4, 0, None))) == [{-1}, {1}, {1}]
    assert signs(subset(splits_of(data, 10), TrainConfig(limit=0.5))) == [{-1}, {1}, {1}]
    few = subset(splits_of(data, 10), TrainConfig(batch_size=8, overfit_batches=1))
    assert [few.train[0][0] < 0, few.test[0][0] > 0] == [True, True]
    both = Data(examples, FIVES, train_transform=minus, transform=lambda value: value * 0)
    assert signs(splits_of(both, 10)) == [{0}, {0}, {0}]


def test_another_process_has_the_transforms() -> None:
    splits = splits_of(Data(pairs(), pairs(), train_transform=minus), 10)

    class Opens(Workload):
        def load_data(self) -> Data:
            return Data(pairs(), pairs())

    for split in (splits.train, splits.validation):
        opened = share(Opens(), split).open()
        assert [opened[index] for index in range(len(opened))] == [split[index] for index in range(len(split))]


@pytest.mark.parametrize("examples", [pairs(), OfArrays()])
def test_a_transform_that_fails_names_its_example(examples: Any) -> None:
    split = splits_of(Data(examples, pairs(), train_transform=lambda value: 1 / 0), 0).train
    with pytest.raises(ExampleError, match=r"^train example \d+ cannot be read: ZeroDivisionError: division by zero$"):
        seen(split)


def test_pictures_are_transformed_before_they_are_scaled_and_only_to_train(tmp_path: Path) -> None:
    for name in ("blue", "red"):
        (tmp_path / name).mkdir()
        for number in range(10):
            Image.new("RGB", (20, 10), name).save(tmp_path / name / f"{number}.png")
    turned = v2.RandomRotation((90, 90), expand=True)
    data = sources.pictures(tmp_path, size=8, train_transform=v2.Compose([turned, v2.RandomInvert(1)]))
    splits = splits_of(data, 4)
    for split, colours in (
        (splits.train, {(255, 255, 0), (0, 255, 255)}),
        (splits.validation, {(0, 0, 255), (255, 0, 0)}),
    ):
        pixels = torch.stack([split[index][0] for index in range(len(split))])
        assert pixels.shape == (len(split), 3, 8, 8)
        assert {*map(tuple, pixels.permute(0, 2, 3, 1).reshape(-1, 3).tolist())} <= colours
    seen_whole = sources.pictures(tmp_path, transform=lambda image: image.size)
    assert splits_of(seen_whole, 4).train[0][0] == (20, 10)
