"""Measure how often compare is wrong: false alarms between runs of one recipe, and planted differences that it misses.

    python benchmarks/false_alarms.py                # 12 minutes on two busy cores

Guards the verdict of `compare`: at most 7 % of 200 pairs that differ only in the seed are called different, and at
least 80 % of 200 pairs whose recipes differ by twice the spread between seeds.

Each run trains a small network on 300 points, with the package's engine, and leaves the files that compare reads; for
one seed, they must equal those of `mnist_ray.train`. Of the worse recipe's labels, 3 % are wrong. Prints the share of
pairs that are called different, for one seed a side and for several.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mnist_ray import compare, train
from mnist_ray.config import TrainConfig
from mnist_ray.data.digests import digests_of
from mnist_ray.data.splits import splits_of
from mnist_ray.parallel.group import Group
from mnist_ray.report.columns import read_columns, write_columns
from mnist_ray.settings import json_lines, values_of
from mnist_ray.storage import RunFolder, locate
from mnist_ray.training.evaluation import evaluate
from mnist_ray.training.trainer import Trainer, create_state
from mnist_ray.workload import Arrays, Classification, Data, setting
from mnist_ray.workload.calls import data_of

RECIPE: Any = {"num_epochs": 12, "batch_size": 64, "learning_rate": 1e-2, "precision": "fp32", "validation_size": 0}
NUM_TRAIN, NUM_TEST, NUM_CLASSES, NUM_INPUTS = 300, 4000, 5, 12
PLANTED = 0.03  # share of wrong labels in the worse recipe
NUM_SEEDS = (1, 3, 5, 6, 8)  # a side
PLACE = {"checkpoint": "checkpoint_epoch-001_step-000000", "seconds": {}}  # what each result.json has


@dataclass(frozen=True)
class Settings:
    """How wrong the data are."""

    flipped: float = setting(0.0, "share of the training labels that are wrong")


class Clouds(Classification):
    """Which of overlapping clouds is a point from?"""

    Settings = Settings

    def load_data(self) -> Data:
        """Return the same points each time."""
        rng = np.random.default_rng(0)
        centres = rng.normal(size=(NUM_CLASSES, NUM_INPUTS))
        targets = rng.integers(NUM_CLASSES, size=NUM_TEST + NUM_TRAIN)
        inputs = (centres[targets] + 1.2 * rng.normal(size=(len(targets), NUM_INPUTS))).astype(np.float32)
        labels = targets[NUM_TEST:].copy()
        wrong = rng.permutation(NUM_TRAIN)[: round(self.settings.flipped * NUM_TRAIN)]
        labels[wrong] = (labels[wrong] + 1) % NUM_CLASSES
        return Data(Arrays(inputs[NUM_TEST:], labels), Arrays(inputs[:NUM_TEST], targets[:NUM_TEST]))

    def create_model(self) -> nn.Module:
        """Return a small network."""
        return nn.Sequential(nn.Linear(NUM_INPUTS, 16), nn.ReLU(), nn.Linear(16, NUM_CLASSES))

    def evaluation_batch_size(self, *, on_gpu: bool) -> int:
        """Return the size of the test."""
        return NUM_TEST


def trained(folder: RunFolder, flipped: float, seed: int) -> float:
    """Train and test a model, and write the files that compare reads; return the accuracy."""
    workload, config = Clouds(Settings(flipped)), TrainConfig(**RECIPE, seed=seed)
    splits = splits_of(data_of(workload), config.validation_size)
    state = create_state(workload, config, NUM_TRAIN, Group())
    Trainer(workload, state, splits.train, config, Group(), []).train()
    tested = evaluate(workload, state.model, splits.test, config)
    write_columns(folder, {"index": splits.test.all_indices, **tested.losses, **tested.columns})
    folder.write_text("config.json", json_lines({**values_of(config), "flipped": flipped}))
    folder.write_text("origin.json", json_lines({"data": digests_of(splits)}))
    formats = {"test_accuracy": "fraction"}
    folder.write_text("result.json", json_lines({**PLACE, "formats": formats, **tested.to_dict(workload)}))
    return tested.values(workload)["accuracy"]


def with_members(storage: str, name: str, flipped: float, seeds: range) -> tuple[list[str], list[float]]:
    """Train a run for each seed; return runs that have the first ones as members, and the accuracies."""
    accuracies = [trained(locate(storage, name).inside(f"members/seed-{seed}"), flipped, seed) for seed in seeds]
    runs = []
    for number in NUM_SEEDS:
        run = locate(storage, f"{name}-{number}")
        members = [f"members/seed-{seed}" for seed in seeds[:number]]
        run.write_text("result.json", json_lines({**PLACE, "members": members}))
        Path(run.path, "members").symlink_to(Path(storage, name, "members"))
        runs.append(run.uri)
    return runs, accuracies


def pair(number: int) -> tuple[list[bool], list[bool], list[float], list[float]]:
    """Train three groups of runs; return whether compare calls the second and the third different from the first.

    The answers are for each number of seeds. Also return the accuracies of the first and of the third group.
    """
    torch.set_num_threads(1)
    starts = [(3 * number + group) * max(NUM_SEEDS) for group in range(3)]
    with tempfile.TemporaryDirectory() as storage:
        (first, accuracies), (same, _), (worse, others) = (
            with_members(storage, name, flipped, range(start, start + max(NUM_SEEDS)))
            for name, flipped, start in zip(("first", "same", "worse"), (0.0, 0.0, PLANTED), starts, strict=True)
        )
        called = [[is_called_different(*runs) for runs in zip(first, second, strict=True)] for second in (same, worse)]
    return called[0], called[1], accuracies, others


def is_called_different(first: str, second: str) -> bool:
    """Return the verdict of compare on two runs."""
    verdict = compare(first, second).verdict
    assert verdict.gain is not None, verdict.sentence
    return verdict.is_sure


def check_files() -> None:
    """Compare a run as this program makes it with one of ``mnist_ray.train``: raise an error if predictions differ."""
    torch.set_num_threads(1)  # as train chooses for small steps
    with tempfile.TemporaryDirectory() as storage:
        trained(locate(storage, "own"), 0.0, 0)
        run = train(Clouds, run_name="whole", storage_path=storage, num_workers=0, seed=0, quiet=True, **RECIPE)
        own, whole = (read_columns(folder) for folder in (locate(storage, "own"), run.folder))
        assert {name: values.tolist() for name, values in own.items()} == {n: v.tolist() for n, v in whole.items()}


def main() -> None:
    """Train all pairs, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    args = parser.parse_args()
    check_files()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        same, worse, accuracies, others = map(np.array, zip(*pool.map(pair, range(args.pairs)), strict=True))
    spread = np.sqrt((accuracies.var(ddof=1) + others.var(ddof=1)) / 2)
    planted = (accuracies.mean() - others.mean()) / spread
    print(f"spread between seeds {100 * spread:.2f} points; planted: {planted:.2f} times the spread")
    for number, alarms, found in zip(NUM_SEEDS, same.mean(0), worse.mean(0), strict=True):
        print(f"{number} a side: {alarms:.1%} of {len(same)} pairs of one recipe called different, {found:.1%} found")


if __name__ == "__main__":
    main()
