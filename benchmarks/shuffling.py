"""Compare the shuffle with NumPy's permutation, in cost and accuracy: python benchmarks/shuffling.py

For each number of examples: milliseconds to the first batch of 128, nanoseconds for each example of the next batches,
and memory. With --accuracy: the test accuracy of the default recipe's network with both, trained in this process.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import tracemalloc
from collections.abc import Sequence

import numpy as np

from mnist_ray.cluster.environment import keep_freed_memory
from mnist_ray.config import TrainConfig
from mnist_ray.training import engine, sampler
from mnist_ray.training.state import Group
from mnist_ray.workload import loading
from mnist_ray.workload.loading import data_of
from mnist_ray.workload.order import Shuffled
from mnist_ray.workload.splits import splits_of

BATCH_SIZE = 128
NUM_BATCHES = 2000


class Permutation:
    """The whole order, drawn at once by NumPy."""

    def __init__(self, number: int, key: Sequence[int]) -> None:
        self._order = np.random.default_rng(tuple(key)).permutation(number)

    def __getitem__(self, places: slice) -> np.ndarray:
        return self._order[places]


def measure(number: int, order: str) -> str:
    """Return a row of the table."""
    first_ms, each_ns = seconds_to_draw(number, order)
    tracemalloc.start()
    seconds_to_draw(number, order)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return f"| {number:,} | {order} | {first_ms * 1e3:,.2f} | {each_ns * 1e9:,.0f} | {peak / 2**20:,.1f} |"


def seconds_to_draw(number: int, order: str) -> tuple[float, float]:
    """Return the seconds to an epoch's first batch, and the seconds per example of the next batches."""
    start = time.perf_counter()
    batches = (slice_.indices for slice_ in sampler.ShardedBatchSampler(number, BATCH_SIZE, seed=0, epoch=0))
    if order == "as a whole":
        whole = Permutation(number, (0, 0))
        batches = (whole[first : first + BATCH_SIZE] for first in range(0, number, BATCH_SIZE))
    next(batches)
    first = time.perf_counter()
    drawn = sum(len(indices) for indices in itertools.islice(batches, NUM_BATCHES))
    return first - start, (time.perf_counter() - first) / drawn


def test_accuracy(seed: int) -> float:
    """Train the default recipe in this process; return the test accuracy of the last weights."""
    workload = loading.load(loading.DEFAULT)()
    data = splits_of(data_of(workload), None)
    group = Group()
    config = TrainConfig(**workload.recipes["default"], seed=seed, precision=engine.resolve_precision("auto", group))
    state = engine.create_state(workload, config, len(data.train), group.device)
    engine.train(workload, state, data.train, config, group)
    return engine.evaluate(workload, state.model, data.test).values(workload)["accuracy"]


def print_accuracies(seeds: Sequence[int]) -> None:
    """Print each seed's accuracy with both orders, one after the other."""
    keep_freed_memory()
    for name, order in (("as a whole", Permutation), ("by place", Shuffled)):
        sampler.Shuffled = order  # type: ignore[misc,assignment,attr-defined]
        accuracies = [test_accuracy(seed) for seed in seeds]
        each = ", ".join(f"{accuracy:.2%}" for accuracy in accuracies)
        print(f"| {name} | {statistics.mean(accuracies):.2%} | {each} |", flush=True)


def main() -> None:
    """Read the flags and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accuracy", action="store_true", help="measure accuracy instead of cost")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    args = parser.parse_args()
    if args.accuracy:
        print_accuracies(args.seeds)
        return
    print("| examples | drawn | first batch, ms | each example after it, ns | MiB |\n|---|---|---|---|---|")
    for exponent in range(4, 10):
        print(measure(10**exponent, "by place"), flush=True)
        if exponent < 9:  # 10⁹ would take 8 GiB
            print(measure(10**exponent, "as a whole"), flush=True)


if __name__ == "__main__":
    main()
