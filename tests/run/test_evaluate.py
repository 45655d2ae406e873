"""How many tasks share a test."""

from __future__ import annotations

import pytest

from mnist_ray.checkpoints.summary import CheckpointMetrics
from mnist_ray.run.evaluate import num_paying


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
