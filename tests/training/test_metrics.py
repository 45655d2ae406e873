import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from mnist_ray.errors import UsageError
from mnist_ray.training.metrics import Evaluation, MetricSums, score
from mnist_ray.workload import Metric, Workload
from mnist_ray.workload.figures import Figure
from tests.conftest import Digits


def test_sums_add_up_and_are_divided_last() -> None:
    sums = MetricSums().plus({"loss": np.array([3.0, 1.0]), "accuracy": np.array([1, 3])}, 2 + 6)
    assert sums.values(Digits()) == {"loss": 0.5, "accuracy": 0.5}
    assert str(MetricSums().values(Digits())) == "{'loss': nan, 'accuracy': nan}"


@pytest.mark.parametrize(("over", "expected"), [("max", 4.0), ("last", -3.0), ("root", 5.0)])
def test_values_of_steps_and_ranks_become_one_without_those_that_are_not_finite(over: Any, expected: float) -> None:
    figure = Figure("figure", ("step",), over)
    assert figure.join([4.0, math.inf, -3.0, math.nan]) == expected
    assert math.isnan(figure.join([math.inf, math.nan]))


def test_an_epoch_that_began_before_a_metric_was_added_has_none() -> None:
    sums = MetricSums({"loss": 1.0}, 2).plus({"loss": np.array([3.0]), "accuracy": np.array([1])}, 2)
    assert str(sums.values(Digits())) == "{'loss': 1.0, 'accuracy': nan}"


@pytest.mark.parametrize("columns", [{"words": np.ones((2, 5))}, {"others": np.ones((2, 3))}])
def test_columns_that_cannot_be_joined_are_named(columns: dict[str, np.ndarray]) -> None:
    parts = [Evaluation(({"loss": 2.0},), 2, each) for each in ({"words": np.ones((2, 3))}, columns)]
    said = r"^predictions: words differs in shape between examples, \(3,\) and (\(5,\)|none); pad them to one$"
    with pytest.raises(UsageError, match=said):
        Evaluation.merge(parts)


def test_metrics_of_numpy_and_torch_are_plain_numbers_that_a_checkpoint_can_hold() -> None:
    class OfLibraries(Workload):
        metrics = (Metric("median", "min"), Metric("mean", "min"))

        def summarize(self, means: Mapping[str, float]) -> dict[str, Any]:
            return {"mean": torch.tensor(means["error"])}

        def summarize_predictions(self, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
            return {"median": np.median(columns["error"])}

    evaluation = Evaluation(({"loss": 1.0, "error": 3.0},), 2, {"error": np.ones(2, np.float32)})
    assert json.dumps(evaluation.values(OfLibraries())) == '{"loss": 0.5, "mean": 1.5, "median": 1.0}'


def test_metrics_of_all_predictions_that_reject_nan_are_nan_if_there_is_one_and_fail_otherwise() -> None:
    class Strict(Workload):
        metrics = (Metric("auc", "max"),)

        def summarize_predictions(self, columns: Mapping[str, np.ndarray]) -> dict[str, float]:
            raise ValueError("Input contains NaN")

    with pytest.raises(ValueError, match="NaN"):
        Evaluation(({"loss": 1.0},), 2, {}, {"loss": np.ones(2)}).values(Strict())
    spoiled = Evaluation(({"loss": 1.0},), 2, {}, {"loss": np.array([1, math.nan])})
    assert str(spoiled.values(Strict())) == "{'loss': 0.5, 'auc': nan}"


def test_metrics_of_all_predictions_are_computed_for_evaluations_only() -> None:
    class Ranked(Workload):
        metrics = (Metric("best", "max"), Metric("last", "max"))

        def summarize_predictions(self, columns: Mapping[str, np.ndarray]) -> dict[str, float]:
            return {"best": columns["score"].max(), "last": columns["score"][-1, 1]}

    parts = [Evaluation(({"loss": 2.0},), 2, {"score": np.array([[1, 2], [3, low]])}) for low in (5, 4)]
    values = Evaluation.merge(parts).values(Ranked())
    assert values == {"loss": 1.0, "best": 5, "last": 4}
    assert Ranked().format(values) == "loss 1.0000, best 5.0000, last 4.0000"
    assert MetricSums({"loss": 2.0}, 2).values(Ranked()) == {"loss": 1.0}
    assert Ranked().format({"loss": 1.0}) == "loss 1.0000"


@pytest.mark.parametrize(
    ("better", "worse", "mode"),
    [
        ({"m": 0.99, "loss": 9.0}, {"m": 0.98, "loss": 0.1}, "max"),
        ({"m": 0.98, "loss": 0.1}, {"m": 0.98, "loss": 1.0}, "max"),
        ({"m": 3.0, "loss": 9.0}, {"m": 4.0, "loss": 1.0}, "min"),
        ({"m": 0.1, "loss": 1.0}, {"m": math.nan, "loss": 0.0}, "max"),
        ({"m": 0.5, "loss": 1.0}, {"m": 0.5, "loss": math.inf}, "max"),
        ({"m": 0.9, "loss": 1.0}, {"m": 0.8, "loss": -2e8}, "max"),
        ({"m": math.nan, "loss": 1.0}, {"m": math.nan, "loss": 2.0}, "max"),
        ({"m": 0.9, "loss": math.nan}, {"m": 0.5, "loss": 1.0}, "max"),
        ({"m": 2e-9, "loss": 3.0}, {"m": 1e-9, "loss": 0.1}, "max"),
        ({"m": 5.0, "loss": 1.0}, {"m": math.inf, "loss": 0.0}, "min"),
    ],
)
def test_the_score_follows_the_monitor_and_in_a_tie_the_loss(
    better: dict[str, float], worse: dict[str, float], mode: Any
) -> None:
    class Measured(Workload):
        metrics = (Metric("m", mode),)

    assert score(Measured(), better) > score(Measured(), worse)
