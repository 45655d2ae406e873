"""How many tasks share a test, and in which precision they compute."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from mnist_ray.checkpoints import checkpoint
from mnist_ray.checkpoints.state_file import CheckpointMetrics
from mnist_ray.config import Precision, TrainConfig
from mnist_ray.data.data import Arrays, Split
from mnist_ray.parallel.group import Group
from mnist_ray.run.evaluate import evaluate_here, num_paying
from mnist_ray.training.trainer import create_state
from tests.conftest import folder_at, mnist


@pytest.mark.parametrize(
    ("rate", "num_examples", "most", "expected"),
    [(1000, 3_000, 8, 1), (1000, 10_000, 8, 5), (1000, 10_000, 2, 2), (25, 1000, 4, 4), (25, 1000, 0, 1)],
)
def test_there_are_as_many_tasks_as_have_work_for_two_seconds(
    rate: float, num_examples: int, most: int, expected: int
) -> None:
    validated = CheckpointMetrics(values={"val_examples_per_s": rate})
    assert num_paying(validated, num_examples, most) == expected
    assert num_paying(CheckpointMetrics(), num_examples, most) == 1, "without a validation, the time is not known"


def test_a_test_computes_in_fp32_whatever_the_trainings_precision(few_images: Arrays, tmp_path: Path) -> None:
    losses = []
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for number, precision in enumerate(precisions):
        config = asdict(TrainConfig(precision=precision))
        folder = folder_at(tmp_path / f"{number}-0")
        state = create_state(mnist(), TrainConfig(), 600, Group())
        checkpoint.snapshot(state, {"workload": mnist().identity, "config": config}).write(folder)
        losses.append(evaluate_here(folder, mnist(), Split(few_images), 0).values(mnist())["loss"])
    assert losses == [losses[0]] * 2
