"""Intervals against tables and against simulations."""

import math

import numpy as np
import pytest

from mnist_ray.report.intervals import mean_interval, t_quantile


@pytest.mark.parametrize(
    ("df", "quantile"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (30, 2.04227), (1e6, 1.95997)]
)
def test_quantiles_are_those_of_tables(df: float, quantile: float) -> None:
    assert t_quantile(df) == pytest.approx(quantile, rel=2e-5)


def test_quantiles_of_fractional_degrees_lie_between() -> None:
    assert t_quantile(5) < t_quantile(4.5) < t_quantile(4)


def test_the_interval_of_a_mean_is_students() -> None:
    assert mean_interval([1, 2, 3]) == pytest.approx((2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), rel=1e-4)
    assert mean_interval([2, 2, 2]) == (2, 2)


def test_one_value_has_no_interval() -> None:
    assert all(map(math.isnan, mean_interval([0.5])))


def test_overlap_of_folds_widens_the_interval_as_nadeau_and_bengio_say() -> None:
    values = np.random.default_rng(0).normal(size=5).tolist()
    widths = [np.ptp(mean_interval(values, overlap)) for overlap in (0, 1 / 4)]
    assert widths[1] / widths[0] == pytest.approx(math.sqrt((1 / 5 + 1 / 4) / (1 / 5)))
