"""Intervals against tables and against simulations."""

import math

import numpy as np
import pytest

from mnist_ray.report.intervals import mcnemar, mean_interval, seeds_interval, t_quantile


@pytest.mark.parametrize(
    ("df", "quantile"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (4.5, 2.65891), (1e6, 1.95997)]
)
def test_quantiles_are_those_of_tables(df: float, quantile: float) -> None:
    assert t_quantile(df) == pytest.approx(quantile, rel=2e-5)


def test_the_interval_of_a_mean_is_students() -> None:
    assert mean_interval([1, 2, 3]) == pytest.approx((2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), rel=1e-4)
    assert mean_interval([2, 2, 2]) == (2, 2)


def test_one_value_has_no_interval() -> None:
    assert all(map(math.isnan, mean_interval([0.5])))


def test_overlap_of_folds_widens_the_interval_as_nadeau_and_bengio_say() -> None:
    values = np.random.default_rng(0).normal(size=5).tolist()
    widths = [np.ptp(mean_interval(values, overlap)) for overlap in (0, 1 / 4)]
    assert widths[1] / widths[0] == pytest.approx(math.sqrt((1 / 5 + 1 / 4) / (1 / 5)))


def test_mcnemars_test_is_the_exact_binomial_one_and_takes_large_numbers() -> None:
    for won, lost in ((0, 0), (5, 0), (6, 0), (26, 5), (7, 30)):
        fewer = sum(math.comb(won + lost, number) for number in range(min(won, lost) + 1))
        assert mcnemar(won, lost) == pytest.approx(min(1, 2 * fewer / 2 ** (won + lost)))
    assert mcnemar(50_000, 49_000) == pytest.approx(0.0014980826)


def test_the_interval_of_seeds_is_welchs_if_all_examples_are_alike() -> None:
    first, second = np.array([1.0, 2, 3, 4]), np.array([5.0, 9, 13])
    parts = [side.var(ddof=1) / len(side) for side in (first, second)]
    df = sum(parts) ** 2 / (parts[0] ** 2 / 3 + parts[1] ** 2 / 2)
    half = t_quantile(df) * math.sqrt(sum(parts))
    rows = [np.repeat(side[:, None], 10, axis=1) for side in (first, second)]
    assert seeds_interval(*rows) == pytest.approx((6.5 - half, 6.5 + half))
    assert seeds_interval(rows[0][:1].repeat(2, 0), rows[0][:1].repeat(2, 0)) == (0, 0)


@pytest.mark.parametrize(("of_seed", "of_both", "of_example"), [(0.02, 0.3, 0.0), (0.0, 0.3, 0.3), (0.02, 0.0, 0.3)])
def test_the_interval_of_seeds_covers_the_difference(of_seed: float, of_both: float, of_example: float) -> None:
    rng, num_seeds, number = np.random.default_rng(0), 5, 200
    found = []
    for _ in range(300):
        sides = [rng.normal(0, of_seed, (num_seeds, 1)) + rng.normal(0, of_both, (num_seeds, number)) for _ in range(2)]
        low, high = seeds_interval(sides[0], sides[1] + rng.normal(0.1, of_example, number))
        found.append(low <= 0.1 <= high)
    assert 0.93 < np.mean(found) < 0.98
