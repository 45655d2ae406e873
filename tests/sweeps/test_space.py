import dataclasses
import math
from typing import Any

import pytest

from mnist_ray.config import SweepConfig, TrainConfig
from mnist_ray.errors import UsageError
from mnist_ray.settings import Choice, Range, build
from mnist_ray.sweeps import space
from mnist_ray.sweeps.space import Point, Space, space_config, space_of
from mnist_ray.workload import Workload, setting
from tests.conftest import mnist

WORKLOAD = type(mnist())


def bounded(**bounds: Any) -> Space:
    return space_of(WORKLOAD, bounds)


def point(batch_size: int, learning_rate: float, seed: int = 0) -> Point:
    return Point((("batch_size", batch_size), ("learning_rate", learning_rate)), seed)


def propose(sweep: SweepConfig | None = None, seed: int = 0, **bounds: Any) -> list[Point]:
    return space.propose(bounded(**bounds), sweep or SweepConfig(), seed)


DEFAULT = point(TrainConfig().batch_size, TrainConfig().learning_rate)


def test_the_same_seed_gives_the_same_proposals_and_another_seed_others() -> None:
    proposals = [propose(seed=seed) for seed in (0, 0, 1)]
    assert proposals[0] == proposals[1]
    assert proposals[0][1:] != proposals[2][1:]


def test_random_proposals_stay_inside_and_start_with_the_default() -> None:
    points = propose(SweepConfig(num_trials=200))
    assert points[0] == DEFAULT
    assert len(points) == 200
    assert {point.values["batch_size"] for point in points} == {32, 64, 128, 256, 512}
    rates = [point.values["learning_rate"] for point in points]
    assert all(5e-4 <= rate <= 2e-2 for rate in rates)
    below = sum(rate < math.sqrt(5e-4 * 2e-2) for rate in rates)
    assert 70 < below < 130, "not log-uniform"


def test_a_default_outside_the_space_is_not_tried() -> None:
    assert DEFAULT not in propose(batch_sizes=(32, 64))
    assert DEFAULT not in propose(learning_rate_min=6e-3)


def test_a_grid_covers_both_ends_for_every_batch_size() -> None:
    points = propose(SweepConfig(search="grid", num_trials=7), batch_sizes=(32, 64))
    assert len(points) == len(set(points)) == 6
    assert {point.values["learning_rate"] for point in points} == {5e-4, 3.162e-3, 2e-2}


def test_a_grid_without_a_trial_for_each_choice_is_refused() -> None:
    with pytest.raises(UsageError, match="--search grid needs a trial for each of the 5 choices of batch_size"):
        propose(SweepConfig(search="grid", num_trials=4))


class Searched(Workload):
    """A workload with settings of its own to search, and another space for the learning rate."""

    @dataclasses.dataclass(frozen=True)
    class Settings:
        width: int = setting(16, "units", search=Choice((8, 16)))
        depth: int = setting(2, "layers", search=Range(1, 5))
        kind: str = setting("a", "kind", search=Choice(("a", "b")))
        plain: int = setting(3, "not searched")

    search = {"learning_rate": Range(0.1, 1.0)}
    recipes = {"default": {"learning_rate": 0.5}}


def test_a_workloads_own_settings_are_searched_beside_the_jobs() -> None:
    found = space_of(Searched, {})
    assert list(found.spaces) == ["batch_size", "learning_rate", "width", "depth", "kind"]
    assert found.defaults == {"batch_size": 128, "learning_rate": 0.5, "width": 16, "depth": 2, "kind": "a"}
    points = space.propose(found, SweepConfig(num_trials=100), seed=0)
    assert {point.values["depth"] for point in points} == {1, 2, 3, 4, 5}
    assert {point.values["kind"] for point in points} == {"a", "b"}
    assert all(0.1 <= point.values["learning_rate"] <= 1.0 for point in points)


def test_a_grid_takes_each_combination() -> None:
    grid = space.propose(space_of(Searched, {"batch_sizes": (32,)}), SweepConfig(search="grid", num_trials=40), seed=0)
    assert len(grid) == len(set(grid)) == 2 * 2 * 3 * 3
    assert {point.values["depth"] for point in grid} == {1, 3, 5}


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"batch_sizes": (32, 32)}, "--batch-sizes must be different values, each of which must be at least 1"),
        ({"batch_sizes": ()}, "--batch-sizes must be different values"),
        ({"batch_sizes": (0,)}, "--batch-sizes must be different values, each of which must be at least 1"),
        ({"learning_rate_min": -1.0}, "--learning-rate-min must be a positive number"),
        ({"learning_rate_min": 0.1}, "--learning-rate-min 0.1 must not be above --learning-rate-max 0.02"),
    ],
)
def test_bad_bounds_are_refused(bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        bounded(**bounds)
    assert message in str(raised.value)


def test_bounds_are_flags_named_after_their_settings() -> None:
    names = [field.name for field in dataclasses.fields(space_config(Searched))]
    assert names == [
        "batch_sizes",
        "learning_rate_min",
        "learning_rate_max",
        "widths",
        "depth_min",
        "depth_max",
        "kinds",
    ]
    config: Any = build(space_config(Searched), {"widths": [4]})
    assert (config.widths, config.depth_max) == ((4,), 5)


def test_a_point_is_named_by_what_it_tries() -> None:
    assert point(9, 0.5, 4).name == "batch_size-9_learning_rate-0.5_seed-4"


def test_a_range_may_be_one_value_and_a_choice_of_truths_or_nothing_is_read_back() -> None:
    assert {p.values["learning_rate"] for p in propose(learning_rate_min=1e-3, learning_rate_max=1e-3)} == {1e-3}

    class Odd(Searched):
        @dataclasses.dataclass(frozen=True)
        class Settings:
            residual: bool = setting(True, "shortcuts", search=Choice((True, False)))
            depth: int | None = setting(None, "layers", search=Choice((None, 8)))

    found = space_of(Odd, {"residuals": (False,)})
    drawn = space.propose(found, SweepConfig(num_trials=20), seed=0)
    assert {point.values["residual"] for point in drawn} == {False}
    assert {point.values["depth"] for point in drawn} == {None, 8}
    as_text = {name: "" if value is None else str(value) for name, value in drawn[1].values.items()}
    assert found.point(as_text, 0) == drawn[1]
