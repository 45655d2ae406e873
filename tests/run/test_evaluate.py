"""How many tasks share a test, and in which precision they compute."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import mnist_ray
from mnist_ray.checkpoints import checkpoint
from mnist_ray.checkpoints.summary import CheckpointMetrics
from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import MicroBatch
from mnist_ray.data.data import Arrays, Split
from mnist_ray.parallel.group import Group
from mnist_ray.run.evaluate import evaluate_here, num_paying
from mnist_ray.training import engine
from mnist_ray.training.evaluation import evaluate
from mnist_ray.training.step import forward
from tests.conftest import QUICK, folder_at, mnist


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


def test_evaluations_and_predictions_of_a_run_follow_its_evaluation_precision(
    ray_address: str, small_data: Path, mnist_test: Arrays, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**QUICK, "precision": "bf16", "evaluation_precision": "training", "num_workers": 0}
    settings["data_dir"] = small_data
    run = mnist_ray.train(**settings, num_epochs=1, storage_path=tmp_path)
    assert mnist_ray.evaluate(run) == run.metrics
    model, test = run.load_model(), Split(mnist_test).between(3000, 4100)
    in_fp32 = evaluate(run.workload, model, test, TrainConfig()).values(run.workload)["loss"]
    assert run.metrics["loss"] != in_fp32
    assert run.metrics["loss"] == pytest.approx(in_fp32, rel=1e-2)
    images = mnist_test.inputs[:20]
    with torch.no_grad():
        logits, _ = forward(run.workload, model, MicroBatch(torch.tensor(images), None, 20), "bf16")
    expected = run.workload.top_predictions(logits)
    assert [list(prediction.top) for prediction in mnist_ray.predict(images, run)] == expected


def test_a_checkpoint_of_an_older_version_is_evaluated_in_fp32(few_images: Arrays, tmp_path: Path) -> None:
    losses = []
    for number, config in enumerate([{}, {"precision": "bf16"}, asdict(TrainConfig(precision="bf16"))]):
        folder = folder_at(tmp_path / f"{number}-0")
        state = engine.create_state(mnist(), TrainConfig(), 600, Group())
        checkpoint.snapshot(state, {"workload": mnist().identity, "config": config}).write(folder)
        losses.append(evaluate_here(folder, mnist(), Split(few_images), 0).values(mnist())["loss"])
    assert losses == [losses[0]] * 3
