"""Examples that training draws by weight, or from several sources in given shares."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from mnist_ray import train
from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import batch_loader, batches_of
from mnist_ray.data.data import Split, Splits
from mnist_ray.data.digests import digests_of
from mnist_ray.data.order import Drawn, StreamOrder
from mnist_ray.data.sampler import ShardedBatchSampler
from mnist_ray.data.splits import splits_of, subset
from mnist_ray.errors import UsageError
from mnist_ray.report.columns import read_columns
from mnist_ray.report.run_files import read_csv
from mnist_ray.workload import Arrays, Blocks, Data, Mix, Regression
from mnist_ray.workload.calls import data_of
from tests.conftest import folder_at

CONFIG = TrainConfig(batch_size=20, num_epochs=3)
CPU = torch.device("cpu")


def arrays(start: int, number: int) -> Arrays:
    values = np.arange(start, start + number, dtype=np.float32)
    return Arrays(values[:, None], values)


class Examples(Dataset):
    def __init__(self, start: int, number: int) -> None:
        self.start, self.number = start, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[np.ndarray, float]:
        return np.full(1, self.start + index, np.float32), float(self.start + index)


class OfBlocks(Blocks):
    def __init__(self, start: int, sizes: list[int]) -> None:
        self.start, self.sizes = start, sizes

    def read(self, block: int) -> Arrays:
        return arrays(self.start + sum(self.sizes[:block]), self.sizes[block])


def loaded(data: Data) -> Splits:
    class Numbers(Regression):
        def load_data(self) -> Data:
            return data

    return splits_of(data_of(Numbers()), None)


def seen(split: Split, rank: int = 0, world_size: int = 1, first_step: int = 0) -> Iterator[list[float]]:
    """Yield the targets of a rank's slices of the steps of all passes, as the engine reads them."""
    batches = batches_of(split, CPU)
    first_pass, first = divmod(first_step, CONFIG.steps_per_pass(len(split)))
    for number in range(first_pass, CONFIG.num_epochs):
        order = batches.order(CONFIG, number, first_step, rank, world_size)
        settings = CONFIG.batch_size, CONFIG.seed, number, rank, world_size, first
        sampler = ShardedBatchSampler(len(split), *settings, order=order)
        yield from (
            batch.targets.tolist() if not batch.is_filler else [] for batch in batch_loader(batches, sampler, CPU)
        )
        first = 0


def test_draws_have_the_shares_of_the_weights() -> None:
    weights = np.random.default_rng(0).random(50) * (np.arange(50) % 5 > 0)
    counts = Counter(itertools.chain(*(Drawn(np.tile(weights, 20_000), (0, 1))[:] % 50,)))
    number, expected = 10**6, weights / weights.sum()
    assert all(counts[index] == 0 for index in range(0, 50, 5)), "a weight of 0 is never drawn"
    for index, share in enumerate(expected):
        assert abs(counts[index] - number * share) <= 5 * np.sqrt(number * share * (1 - share))


def test_any_part_of_the_draws_can_be_computed_alone() -> None:
    order = Drawn(np.arange(1000.0), (3, 4))
    assert np.concatenate([order[:17], order[17:400], order[400:]]).tolist() == order[:].tolist()
    assert order[:].tolist() != Drawn(np.arange(1000.0), (3, 5))[:].tolist()


WEIGHTED = Data(arrays(0, 100), arrays(0, 9), weights=np.arange(100.0))
SHARES = {"web": (arrays(0, 300), 3.0), "books": (arrays(1000, 100), 6.0), "code": (arrays(2000, 50), 1.0)}
MIXED = {
    "arrays": Mix(SHARES),
    "datasets": Mix(
        {name: (Examples(int(part.targets[0]), len(part)), share) for name, (part, share) in SHARES.items()}
    ),
    "blocks": Mix(
        {
            name: (OfBlocks(int(part.targets[0]), [5] * (len(part) // 5)), share)
            for name, (part, share) in SHARES.items()
        }
    ),
}


@pytest.mark.parametrize("examples", [WEIGHTED.train, *MIXED.values()], ids=["weights", *MIXED])
def test_batches_do_not_depend_on_the_ranks_and_a_resumed_run_has_the_same(examples: Any) -> None:
    weights = WEIGHTED.weights if examples is WEIGHTED.train else None
    split = loaded(Data(examples, arrays(0, 9), weights=weights)).train
    whole = [*seen(split)]
    for world_size in (2, 3):
        ranks = [[*seen(split, rank, world_size)] for rank in range(world_size)]
        assert [[*itertools.chain(*parts)] for parts in zip(*ranks, strict=True)] == whole
    for first_step, world_size in zip((1, 5, 13), (3, 1, 2), strict=True):
        ranks = [[*seen(split, rank, world_size, first_step)] for rank in range(world_size)]
        assert [[*itertools.chain(*parts)] for parts in zip(*ranks, strict=True)] == whole[first_step:]


@pytest.mark.parametrize("name", MIXED)
def test_each_source_of_a_mix_has_its_share(name: str) -> None:
    split = loaded(Data(MIXED[name], arrays(0, 9))).train
    numbers = Counter(int(value // 1000) for batch in seen(split) for value in batch)
    assert sum(numbers.values()) == 3 * len(split)
    for number, share in enumerate((0.3, 0.6, 0.1)):
        assert numbers[number] / (3 * len(split)) == pytest.approx(share, abs=0.05 if name != "blocks" else 0.01)


def test_blocks_of_a_mix_have_their_shares_all_along_a_pass() -> None:
    sizes, numbers = np.full(900, 10), np.repeat([0, 1, 2], [600, 200, 100])
    order = StreamOrder(sizes, 90, 3, 0, 1, mixed=(numbers, (0.3, 0.6, 0.1)))
    tenths = order[:].reshape(10, -1) // 10
    for tenth in tenths:
        shares = np.bincount(numbers[tenth], minlength=3) / tenth.size
        assert shares == pytest.approx([0.3, 0.6, 0.1], abs=0.03)
    assert len(order) == sizes.sum()


@pytest.mark.parametrize(
    ("sizes", "num_first", "share"),
    [([1000] * 40, 20, 0.99), ([1000] * 12, 10, 0.9), ([1000] * 21, 20, 0.95), ([100] * 40 + [2000] * 2, 40, 0.8)],
)
def test_over_many_passes_a_source_of_few_blocks_has_its_share(sizes: list[int], num_first: int, share: float) -> None:
    numbers, ends, found = (np.arange(len(sizes)) >= num_first).astype(int), np.cumsum(sizes), 0.0
    for pass_number in range(300):
        order = StreamOrder(np.array(sizes), 100, 1, 0, pass_number, mixed=(numbers, (share, 1 - share)))
        found += float((numbers[np.searchsorted(ends, order[:], side="right")] == 0).mean()) / 300
    assert found == pytest.approx(share, abs=0.015)


class Noisy(Examples):
    def __getitem__(self, index: int) -> tuple[np.ndarray, float]:
        return super().__getitem__(index)[0], float(torch.rand(()))


@pytest.mark.parametrize("is_mix", [False, True])
def test_an_example_that_is_drawn_again_has_other_random_numbers(is_mix: bool) -> None:
    rare = np.where(np.arange(100) < 3, 20.0, 1.0)
    mix = Mix({"rare": (Noisy(0, 3), 1), "other": (Noisy(3, 97), 1)})
    data = Data(mix, arrays(0, 9)) if is_mix else Data(Noisy(0, 100), arrays(0, 9), weights=rare)
    split = loaded(data).train
    whole = [*itertools.chain(*seen(split))]
    assert len({*whole[: len(split)]}) == len(split), "in a pass"
    ranks = [[*seen(split, rank, 3, first_step=2)] for rank in range(3)]
    assert [*itertools.chain(*(itertools.chain(*parts) for parts in zip(*ranks, strict=True)))] == whole[40:]


def test_the_weights_are_those_of_the_examples_that_are_left_to_train_on() -> None:
    for splits in (loaded(WEIGHTED), subset(loaded(WEIGHTED), TrainConfig(limit=0.3, batch_size=2))):
        split = splits.train
        assert split.weights is not None
        assert split.weights.tolist() == [split[index][1] for index in range(len(split))]
        assert splits.validation.draws is not None, "it is held out from the same examples"


def test_the_name_of_the_data_says_what_the_metrics_of_the_training_are_over() -> None:
    assert loaded(WEIGHTED).name == "Numbers (drawn by weight)"
    assert loaded(Data(MIXED["arrays"], arrays(0, 9))).name == "Numbers (shares: web 0.3, books 0.6, code 0.1)"


def test_other_weights_and_shares_are_other_data() -> None:
    other = Data(WEIGHTED.train, WEIGHTED.test, weights=np.arange(100.0) + 1)
    found = [digests_of(loaded(data))["weights"] for data in (WEIGHTED, WEIGHTED, other)]
    assert found[0] == found[1] != found[2]
    assert "weights" not in digests_of(loaded(Data(WEIGHTED.train, WEIGHTED.test)))
    shares = [Mix({**SHARES, "web": (SHARES["web"][0], share)}) for share in (3.0, 4.0)]
    first, second = (digests_of(loaded(Data(mix, arrays(0, 9))))["weights"] for mix in shares)
    assert first != second


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(99), r"weights must be a NumPy array with a number per example, \(100,\), not float64 \(99,\)"),
        ([1.0] * 100, r"weights must be a NumPy array .* not list"),
        (np.full(100, "x"), r"not <U1 \(100,\)"),
        (np.full(100, -1.0), "weights must be finite numbers from 0, not all of them 0"),
        (np.full(100, np.nan), "weights must be finite numbers from 0"),
        (np.zeros(100), "not all of them 0"),
    ],
)
def test_wrong_weights_are_one_line(weights: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loaded(Data(arrays(0, 100), arrays(0, 9), weights=weights))


def test_weights_are_not_for_blocks_or_a_mix() -> None:
    with pytest.raises(UsageError, match="weights are not for Blocks; a Mix of them has shares"):
        loaded(Data(OfBlocks(0, [5] * 20), arrays(0, 9), weights=np.ones(100)))
    with pytest.raises(UsageError, match="weights are not for a Mix, which has shares"):
        loaded(Data(MIXED["arrays"], arrays(0, 9), weights=np.ones(450)))


def of_classes(*names: str) -> Examples:
    examples: Any = Examples(0, 5)
    examples.classes = [*names]
    return examples


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "Mix: there are no sources"),
        ({"web": arrays(0, 5)}, "Mix: web must be a pair"),
        ({"web": (arrays(0, 5), 0)}, "Mix: web must be a pair"),
        (
            {"web": (arrays(0, 5), 1), "books": (Examples(0, 5), 1)},
            "must all be Arrays, or all Blocks, or all Datasets",
        ),
        ({"web": (arrays(0, 5), 1), "books": (Arrays(np.zeros((5, 2)), np.zeros(5)), 1)}, "differ in shape"),
        ({name: (of_classes(*name.split()), 1) for name in ("cat dog", "dog cat")}, "differ in classes, or in the ord"),
    ],
)
def test_a_wrong_mix_is_one_line(sources: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Mix(sources)


def test_a_run_on_a_mix_has_the_loss_of_each_source(tmp_path: Path) -> None:
    class Numbers(Regression):
        def load_data(self) -> Data:
            rng = np.random.default_rng(0)
            near, far = (Arrays(rng.random((80, 2), np.float32), rng.random(80) + shift) for shift in (0, 9))
            return Data(Mix({"near": (near, 9), "far": (far, 1)}), Mix({"near": (near, 1), "far": (far, 1)}))

        def create_model(self) -> nn.Module:
            return nn.Linear(2, 1)

    train(Numbers, num_workers=0, num_epochs=2, storage_path=tmp_path, run_name="mixed")
    _, last = read_csv(folder_at(tmp_path / "mixed"), "metrics.csv")
    assert float(last["val_loss.far"]) > 5 * float(last["val_loss.near"])
    numbers = [float(last[f"val_loss{name}"]) for name in ("", ".near", ".far")]
    assert min(numbers) < numbers[0] < max(numbers)
    result = json.loads((tmp_path / "mixed" / "result.json").read_text())
    assert result["test_loss"] == pytest.approx((result["test_loss.near"] + result["test_loss.far"]) / 2)
    assert "validation, far ends at" in (tmp_path / "mixed" / "report.html").read_text()
    assert set(read_columns(folder_at(tmp_path / "mixed"))) >= {"index", "loss", "prediction"}
