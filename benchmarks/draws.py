"""Compare drawn and streamed examples with plain PyTorch.

    python benchmarks/draws.py    # 3 minutes on two cores

Guards that `Data(weights=…)` finds a rare class as a plain loop with `WeightedRandomSampler` does, and that a stream is
read as fast as by a plain `DataLoader`. The classes are MNIST's 3 and 8, with one 8 for fifty 3s in the training; the
recall is that of the 8s in the test set. Prints a row per seed, then the rates of three alternating rounds.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from mnist_ray import train
from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import Batches, batch_loader, order_of
from mnist_ray.data.data import Split
from mnist_ray.data.sampler import ShardedBatchSampler
from mnist_ray.mnist import MNIST, idx
from mnist_ray.mnist.cnn import CNN
from mnist_ray.workload import Arrays, Data, Streamed

SETTINGS: dict[str, Any] = {"num_epochs": 2, "batch_size": 32, "learning_rate": 1e-3, "lr_schedule": "constant"}
NUM_STREAMED = 20_000


def rare(is_drawn: bool) -> Data:
    """Return 3s and, fifty times as rare, 8s."""
    whole, test = idx.load("train"), idx.load("test")
    threes, eights = (np.flatnonzero(whole.targets == digit) for digit in (3, 8))
    chosen = np.concatenate([threes, eights[: len(threes) // 50]])
    targets = (whole.targets[chosen] == 8).astype(np.int64)
    of_test = np.isin(test.targets, (3, 8))
    tested = Arrays(test.inputs[of_test], (test.targets[of_test] == 8).astype(np.int64))
    weights = 1 / np.bincount(targets)[targets] if is_drawn else None
    return Data(Arrays(whole.inputs[chosen], targets), tested, weights=weights, metadata={"class_names": ["3", "8"]})


class Rare(MNIST):
    """Is it an 8?"""

    def load_data(self) -> Data:
        """Return the digits."""
        return rare(is_drawn=False)


class RareDrawn(MNIST):
    """Is it an 8? Both come equally often."""

    def load_data(self) -> Data:
        """Return the digits, with weights."""
        return rare(is_drawn=True)


def recall_of(workload: type[MNIST], seed: int, folder: Path) -> float:
    """Train a run; return the recall of the 8s in the test set."""
    name = f"{workload.__name__}-{seed}"
    where: dict[str, Any] = {"storage_path": folder, "run_name": name, "num_workers": 0, "quiet": True}
    options: dict[str, Any] = {"precision": "fp32", "validation_size": 0, "beta1": 0.9, "beta2": 0.999}
    with contextlib.redirect_stdout(io.StringIO()):
        run = train(workload, seed=seed, **SETTINGS, **options, **where)
    recall: float = run.result["test_accuracy_per_class"][1]
    return recall


def plain_recall(seed: int) -> float:
    """Train a plain loop with ``WeightedRandomSampler``; return the recall."""
    data = rare(is_drawn=True)
    torch.manual_seed(seed)
    model = CNN(2)
    optimizer = torch.optim.Adam(model.parameters(), SETTINGS["learning_rate"])
    examples: Any = data.train
    inputs, targets = torch.tensor(examples.inputs)[:, None] / 255, torch.tensor(examples.targets)
    assert data.weights is not None
    sampler = WeightedRandomSampler(data.weights.tolist(), len(targets))
    for _ in range(SETTINGS["num_epochs"]):
        for images, labels in DataLoader(TensorDataset(inputs, targets), SETTINGS["batch_size"], sampler=sampler):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    tested: Any = data.test
    with torch.no_grad():
        found = model(torch.tensor(tested.inputs)[:, None] / 255).argmax(1).numpy()
    return float(found[tested.targets == 1].mean())


def images() -> Iterator[tuple[np.ndarray, int]]:
    """Yield MNIST's images, from the first on."""
    whole = idx.load("train")
    for index in range(len(whole)):
        yield whole.inputs[index].astype(np.float32) / 255, int(whole.targets[index])


class Images(IterableDataset):
    """The same images, for a plain ``DataLoader``."""

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        return images()


def read_plainly() -> None:
    """Read the images by a plain ``DataLoader``."""
    for number, _ in enumerate(DataLoader(Images(), 32)):
        if 32 * number >= NUM_STREAMED:
            return


def read_as_a_worker() -> None:
    """Read the images as a worker's training does."""
    config = TrainConfig(batch_size=32, num_steps=NUM_STREAMED // 32)
    batches = Batches(Split(Streamed(images)), torch.device("cpu"))
    sampler = ShardedBatchSampler(len(batches), 32, 0, 0, order=order_of(batches.split, config, 0))
    for number, _ in enumerate(batch_loader(batches, sampler, torch.device("cpu"))):
        if 32 * number >= NUM_STREAMED:
            return


def rate_of(read: Callable[[], None]) -> float:
    """Return the examples per second."""
    start = time.perf_counter()
    read()
    return NUM_STREAMED / (time.perf_counter() - start)


def main() -> None:
    """Print the recalls, then the rates."""
    print("| seed | all alike | drawn | WeightedRandomSampler |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        recalls = []
        for seed in range(5):
            recalls.append([*(recall_of(kind, seed, Path(name)) for kind in (Rare, RareDrawn)), plain_recall(seed)])
            print(f"| {seed} | " + " | ".join(f"{recall:.1%}" for recall in recalls[-1]) + " |")
    print("| mean | " + " | ".join(f"{mean:.1%}" for mean in np.mean(recalls, 0)) + " |")
    for _ in range(3):
        own, plain = rate_of(read_as_a_worker), rate_of(read_plainly)
        print(f"stream: {own:,.0f} examples/s, plain DataLoader {plain:,.0f}, ratio {own / plain:.2f}")


if __name__ == "__main__":
    main()
