import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mnist_ray.training.metrics import MetricSums
from mnist_ray.workload import Regression

PREDICTIONS = np.array([3, -1, 4, 1, -5, 9, 2, 6, 5, 3], np.float32)
TARGETS = np.array([2, 0, 4, -1, -3, 7, 2, 5, 8, 3], np.float32)


def values_of(predictions: np.ndarray, targets: np.ndarray, cuts: Sequence[int] = ()) -> dict[str, float]:
    """Return what comes out where the examples are cut into batches at some places."""
    problem, sums = Regression(), MetricSums()
    for some, their_targets in zip(np.split(predictions, cuts), np.split(targets, cuts), strict=True):
        outputs, on_them = torch.from_numpy(some), torch.from_numpy(their_targets)
        values = {"loss": problem.loss(outputs, on_them).double(), **problem.measure(outputs, on_them)}
        sums = sums.plus({name: each.sum().numpy()[None] for name, each in values.items()}, len(some))
    return sums.values(problem)


def expected_of(predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    errors, deviations = predictions.astype(float).ravel() - targets, targets - targets.mean(dtype=float)
    squared = (errors**2).mean()
    return {
        "loss": squared,
        "rmse": math.sqrt(squared),
        "mae": np.abs(errors).mean(),
        "r2": 1 - (errors**2).sum() / (deviations**2).sum(),
    }


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (1237, 0), (1, 1000)])
@pytest.mark.parametrize("cuts", [[], [2, 3, 7], [4, 4], [0], range(1, 10)])
def test_the_metrics_are_exact_for_any_batches(cuts: Sequence[int], scale: int, shift: int) -> None:
    predictions, targets = PREDICTIONS * scale + shift, TARGETS * scale + shift
    values = values_of(predictions, targets, cuts)
    assert values == values_of(predictions, targets)
    assert values == pytest.approx(expected_of(predictions, targets), rel=1e-9 if shift else 1e-12)


@pytest.mark.parametrize("dtype", [np.int16, np.float64])
def test_outputs_may_stand_in_a_column_and_targets_be_numbers_of_any_dtype(dtype: type[np.generic]) -> None:
    assert values_of(PREDICTIONS[:, None], TARGETS.astype(dtype)) == values_of(PREDICTIONS, TARGETS)


def test_the_loss_is_fp32_whatever_the_targets_are() -> None:
    losses = Regression().loss(torch.ones(2, 1), torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert losses.dtype is torch.float32
    assert losses.tolist() == [0, 4]


def test_the_mean_explains_nothing_and_the_targets_themselves_all() -> None:
    mean = np.full_like(TARGETS, TARGETS.mean())
    assert values_of(mean, TARGETS)["r2"] == pytest.approx(0, abs=1e-6)
    assert values_of(TARGETS, TARGETS) == {"loss": 0, "rmse": 0, "mae": 0, "r2": 1}


def test_targets_that_are_all_the_same_have_no_variance_to_explain_and_rounding_is_none() -> None:
    values = values_of(np.ones(7, np.float32), np.full(7, 3, np.float32))
    assert math.isnan(values.pop("r2"))
    assert values == {"loss": 4, "rmse": 2, "mae": 2}
    assert math.isnan(values_of(np.ones(6, np.float32), np.full(6, 0.1))["r2"])


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_predictions_tell_target_and_prediction(shape: tuple[int, ...]) -> None:
    outputs, targets = torch.tensor([1.5, 2.5, 3.5]).reshape(shape), torch.tensor([1.0, 2.0, 4.0])
    columns = Regression().predictions(outputs, targets)
    assert {name: values.tolist() for name, values in columns.items()} == {
        "target": [1, 2, 4],
        "prediction": [1.5, 2.5, 3.5],
    }


def test_the_report_has_pictures_if_there_are_predictions() -> None:
    columns = {"target": np.array([1.0, 12345.0]), "prediction": np.array([1.5, 2.0])}
    pictures = Regression().pictures({}, None, columns)
    assert [picture.name for picture in pictures] == ["predictions"]
    assert pictures[0].alt == "2 predictions against their targets, from 1 to 12345"
    assert Regression().pictures({}, None, {}) == []
