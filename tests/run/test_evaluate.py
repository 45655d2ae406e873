"""How many tasks share a test, in which precision they compute, and tests of several models as one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mnist_ray
from mnist_ray.checkpoints import checkpoint
from mnist_ray.checkpoints.summary import CheckpointMetrics
from mnist_ray.config import Precision, TrainConfig
from mnist_ray.data.data import Arrays, Split
from mnist_ray.errors import UsageError
from mnist_ray.parallel.group import Group
from mnist_ray.run.evaluate import evaluate_here, num_paying
from mnist_ray.training import engine
from mnist_ray.workload import Data, Regression, Workload, loading, setting
from tests.conftest import QUICK, folder_at, mnist, run_main


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
        state = engine.create_state(mnist(), TrainConfig(), 600, Group())
        checkpoint.snapshot(state, {"workload": mnist().identity, "config": config}).write(folder)
        losses.append(evaluate_here(folder, mnist(), Split(few_images), 0).values(mnist())["loss"])
    assert losses == [losses[0]] * 2


def test_an_ensemble_has_the_mean_of_its_models_probabilities_in_the_command_too(
    ray_address: str, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {**QUICK, "num_workers": 0, "num_epochs": 1, "data_dir": small_data}
    runs = [mnist_ray.train(**settings, seed=seed, storage_path=tmp_path, run_name=f"seed-{seed}") for seed in (1, 2)]
    found = mnist_ray.evaluate(runs)
    test: Any = runs[0].workload.load_data().test
    inputs, targets = test.inputs, torch.tensor(test.targets).long()
    with torch.no_grad():
        outputs = [run.load_model()(mnist().prepare(torch.tensor(inputs), None)) for run in runs]
    probabilities = torch.stack([each.softmax(1) for each in outputs]).mean(0)
    assert found["accuracy"] == pytest.approx((probabilities.argmax(1) == targets).double().mean().item())
    assert found["loss"] == pytest.approx(-probabilities[range(1100), targets].log().mean().item(), rel=1e-5)
    assert found["loss"] < min(run.metrics["loss"] for run in runs)
    capsys.readouterr()
    run_main("evaluate", "seed-1", "seed-2", "--storage-path", str(tmp_path), "--num-tasks", "2")
    said = capsys.readouterr().out
    assert f"loss {found['loss']:.4f} on 1,100 images" in said
    assert said.count("checkpoint ") == 2


class Scaled(Regression):
    @dataclass(frozen=True)
    class Settings:
        scale: float = setting(1.0, "what the inputs are multiplied by")

    def load_data(self) -> Data:
        few = Arrays(np.ones((20, 2), np.float32), np.arange(20.0))
        return Data(few, few)

    def create_model(self) -> torch.nn.Module:
        model = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        return model

    def prepare(self, inputs: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        return inputs.mul_(self.settings.scale)  # in place


def test_a_run_is_no_ensemble_with_itself(finished_run: Path) -> None:
    with pytest.raises(UsageError, match=r"^an ensemble needs different runs; one is named twice$"):
        mnist_ray.evaluate([finished_run, str(finished_run)])


def test_no_run_at_all_is_not_the_newest_run() -> None:
    with pytest.raises(UsageError, match=r"^evaluate\(\) got an empty list of runs; leave it out for the newest run$"):
        mnist_ray.evaluate([])


def test_each_member_of_an_ensemble_prepares_its_own_inputs(tmp_path: Path) -> None:
    members = []
    for scale in (1.0, 10.0):
        workload = loading.load(Scaled)(Scaled.Settings(scale))
        state = engine.create_state(workload, TrainConfig(), 20, Group())
        checkpoint.snapshot(state, {"workload": workload.identity}).write(folder_at(tmp_path / f"{scale:g}-0"))
        members.append((folder_at(tmp_path / f"{scale:g}-0"), workload))
    for (folder, workload), *others in (members, members[::-1]):
        tested = evaluate_here(folder, workload, Split(workload.load_data().test), 0, others=others)
        assert tested.columns["prediction"].tolist() == [(2.0 + 20.0) / 2] * 20


class Fixed(Regression):
    def load_data(self) -> Data:
        few = Arrays(np.ones((20, 2), np.float32), np.arange(20.0))
        return Data(few, few)

    def create_model(self) -> torch.nn.Module:
        return torch.nn.Linear(2, 1)


class Odd(Fixed):
    average = Workload.average


@pytest.mark.parametrize("kind", [Fixed, Odd])
def test_a_model_twice_is_itself_unless_its_workload_has_no_average(kind: type[Fixed], tmp_path: Path) -> None:
    folder, workload = folder_at(tmp_path / "1-0"), loading.load(kind)()
    few = Split(workload.load_data().test)
    state = engine.create_state(workload, TrainConfig(), 20, Group())
    checkpoint.snapshot(state, {"workload": workload.identity}).write(folder)
    alone = evaluate_here(folder, workload, few, 0)
    if kind is Odd:
        with pytest.raises(UsageError, match="Odd defines no average"):
            evaluate_here(folder, workload, few, 0, others=[(folder, workload)])
    else:
        twice = evaluate_here(folder, workload, few, 0, others=[(folder, workload)])
        assert twice.values(workload)["rmse"] == pytest.approx(alone.values(workload)["rmse"])
