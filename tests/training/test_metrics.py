import math

import numpy as np
import pytest

from mnist_ray.training.metrics import Evaluation, MetricSums


def test_sums_add_up_and_are_divided_last() -> None:
    sums = MetricSums(3.0, 1, 2) + MetricSums(1.0, 3, 6)
    assert (sums.loss, sums.accuracy) == (0.5, 0.5)


def test_no_images_have_no_mean() -> None:
    assert math.isnan(MetricSums().loss)
    assert math.isnan(MetricSums().accuracy)


def test_an_evaluation_counts_by_label_and_prediction() -> None:
    evaluation = Evaluation((1.0, 2.0), np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]]), np.empty(0), np.empty(0))
    assert evaluation.num_images == 10
    assert evaluation.accuracy == pytest.approx(0.7)
    assert evaluation.loss == pytest.approx(0.3)
    assert evaluation.accuracy_per_class[:2] == pytest.approx([0.75, 2 / 3])
    assert math.isnan(evaluation.accuracy_per_class[2])
    assert evaluation.to_dict("test")["test_accuracy_per_class"][2] is None


def test_merged_parts_give_what_the_whole_gives() -> None:
    losses = tuple(np.random.default_rng(0).random(7).tolist())
    confusion = np.arange(4).reshape(2, 2)
    predictions, probabilities = np.arange(6), np.linspace(0.1, 0.9, 6)
    whole = Evaluation(losses, confusion * 2, predictions, probabilities)
    parts = [
        Evaluation(losses[:3], confusion, predictions[:2], probabilities[:2]),
        Evaluation(losses[3:], confusion, predictions[2:], probabilities[2:]),
    ]
    merged = Evaluation.merge(parts)
    assert merged.loss == whole.loss
    np.testing.assert_array_equal(merged.confusion, whole.confusion)
    np.testing.assert_array_equal(merged.predictions, whole.predictions)
    np.testing.assert_array_equal(merged.probabilities, whole.probabilities)
