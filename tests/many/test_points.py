import dataclasses
import math
from typing import Any

import pytest

from mnist_ray.config import SweepConfig
from mnist_ray.errors import UsageError
from mnist_ray.many import proposals
from mnist_ray.many.points import Point, Space, space_of
from mnist_ray.settings import Choice, Range
from mnist_ray.workload import Workload, setting
from tests.conftest import mnist
from tests.many.conftest import point

WORKLOAD = type(mnist())


def over(*texts: str) -> Space:
    """Return the space of these texts; by default the workload's."""
    return space_of(WORKLOAD, {"sweep": texts})


def propose(*texts: str, sweep: SweepConfig | None = None, seed: int = 0) -> list[Point]:
    return points_of(over(*texts), sweep or SweepConfig(), seed)


def points_of(space: Space, sweep: SweepConfig, seed: int = 0) -> list[Point]:
    return [Point(configuration, 0) for configuration in proposals.propose(space, sweep, seed)]


DEFAULT = point(*(WORKLOAD.recipes["default"][name] for name in ("batch_size", "learning_rate")))


def test_random_proposals_start_with_the_default_stay_inside_and_depend_on_the_seed_alone() -> None:
    proposals = [propose(seed=seed) for seed in (0, 0, 1)]
    assert proposals[0] == proposals[1]
    assert proposals[0][1:] != proposals[2][1:]
    points = propose(sweep=SweepConfig(num_trials=200))
    assert (points[0], len(points)) == (DEFAULT, 200)
    assert {point.values["batch_size"] for point in points} == {32, 64, 128, 256, 512}
    rates = [point.values["learning_rate"] for point in points]
    assert all(5e-4 <= rate <= 2e-2 for rate in rates)
    below = sum(rate < math.sqrt(5e-4 * 2e-2) for rate in rates)
    assert 70 < below < 130, "not log-uniform"


@pytest.mark.parametrize(("text", "shares"), [("1:3", [1 / 3] * 3), ("log:1:3", [0.5, 0.29, 0.21])])
def test_whole_numbers_are_drawn_as_often_at_the_ends_of_a_range(text: str, shares: list[float]) -> None:
    sweep = SweepConfig(num_trials=2000)
    drawn = propose(f"warmup_steps={text}", "beta1=0.1:0.9", sweep=sweep)[1:]  # the second one makes points different
    numbers = [point.values["warmup_steps"] for point in drawn]
    assert [numbers.count(number) / len(numbers) for number in (1, 2, 3)] == pytest.approx(shares, abs=0.05)


def test_a_narrow_range_has_many_values() -> None:
    drawn = propose("ema_decay=0.9999:0.99999", sweep=SweepConfig(num_trials=50))
    assert len({point.values["ema_decay"] for point in drawn}) == 50


def test_a_default_outside_the_space_is_not_tried() -> None:
    rates = "learning_rate=log:5e-4:2e-2"
    assert DEFAULT in propose("batch_size=64,128", rates)
    assert DEFAULT not in propose("batch_size=32,64", rates)
    assert DEFAULT not in propose("batch_size=64,128", "learning_rate=6e-3:2e-2")
    assert propose("ema_decay=0.9:0.99")[0].values["ema_decay"] is not None


def test_a_space_up_to_a_number_has_this_number_in_place_of_larger_ones_also_as_the_default() -> None:
    less = over("batch_size=8:500", "beta1=0.5,0.6").up_to(100, "batch_size")
    assert less.texts() == ("batch_size=8:100", "beta1=0.5,0.6")
    assert less.default is None
    assert over().up_to(100, "batch_size").default == point(100, DEFAULT.values["learning_rate"]).configuration


def test_a_grid_covers_both_ends_for_every_batch_size() -> None:
    some = ("batch_size=32,64", "learning_rate=log:5e-4:2e-2")
    points = propose(*some, sweep=SweepConfig(search_algorithm="grid", num_trials=7))
    assert points == [point(size, rate) for rate in (5e-4, 3.162e-3, 2e-2) for size in (32, 64)]
    needed = "needs 10 trials for all combinations of batch_size, learning_rate, with both ends of learning_rate"
    with pytest.raises(UsageError, match=f"^--search-algorithm grid {needed}$"):
        propose(sweep=SweepConfig(search_algorithm="grid", num_trials=9))


class Searched(Workload):
    """A workload with its own settings to search, and another space for the learning rate."""

    @dataclasses.dataclass(frozen=True)
    class Settings:
        width: int = setting(16, "units", search=Choice((8, 16)))
        depth: int = setting(2, "layers", search=Range(1, 5))
        kind: str = setting("a", "kind", search=Choice(("a", "b")))
        plain: int = setting(3, "not searched")

    search = {"learning_rate": Range(0.1, 1.0)}
    recipes = {"default": {"learning_rate": 0.5}}


def test_a_workloads_settings_are_searched_with_the_jobs_and_a_grid_takes_each_combination() -> None:
    found = space_of(Searched, {})
    assert list(found.spaces) == ["batch_size", "learning_rate", "width", "depth", "kind"]
    assert found.defaults == {"batch_size": 32, "learning_rate": 0.5, "width": 16, "depth": 2, "kind": "a"}
    points = points_of(found, SweepConfig(num_trials=100))
    assert {point.values["depth"] for point in points} == {1, 2, 3, 4, 5}
    assert {point.values["kind"] for point in points} == {"a", "b"}
    assert all(0.1 <= point.values["learning_rate"] <= 1.0 for point in points)

    found = space_of(Searched, {}, fixed=["batch_size", "plain"])
    grid = points_of(found, SweepConfig(search_algorithm="grid", num_trials=40))
    assert len(grid) == len(set(grid)) == 2 * 2 * 3 * 3
    assert {point.values["depth"] for point in grid} == {1, 3, 5}


def test_options_may_hold_commas_and_quotes() -> None:
    found = space_of(Searched, {"sweep": ['kind="a,b", c,"""d"" e"']})
    assert found.spaces == {"kind": Choice(("a,b", "c", '"d" e'))}
    assert space_of(Searched, {"sweep": found.texts()}) == found
    for wrong in ('kind="a,b', "kind=a\nb"):
        with pytest.raises(UsageError, match=r"write A,B,C, with double quotes around a value that contains a comma$"):
            space_of(Searched, {"sweep": [wrong]})


def test_a_search_space_of_another_type_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Searched, "search", {"width": (8, 16)})
    with pytest.raises(UsageError, match=r"^the search space of width: \(8, 16\) is neither a Choice nor a Range$"):
        space_of(Searched, {})


def test_only_named_settings_are_searched() -> None:
    found = space_of(Searched, {"sweep": ["plain=1:9", "clip-grad-norm=none,0.5", "kind=b,c"]})
    assert found.spaces == {"plain": Range(1, 9), "clip_grad_norm": Choice((None, 0.5)), "kind": Choice(("b", "c"))}
    assert found.defaults == {"plain": 3, "clip_grad_norm": None, "kind": "a"}
    points = points_of(found, SweepConfig(num_trials=60))
    assert {point.values["plain"] for point in points} == set(range(1, 10))
    assert found.texts() == ("plain=1:9", "clip_grad_norm=none,0.5", "kind=b,c")
    assert space_of(Searched, {"sweep": found.texts()}) == found
    assert over(*over().texts()) == over()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size", "write NAME=A,B,C, NAME=LOW:HIGH or NAME=log:LOW:HIGH"),
        ("lerning_rate=1:2", "there is no setting lerning_rate; did you mean learning_rate?"),
        ("batch_size=32,32", "values must differ"),
        ("batch_size=0,1", "--batch-size must be at least 1, not 0"),
        ("batch_size=1.5", "'1.5' is not of type int"),
        ("optimizer=adam,lion", "--optimizer must be one of adam, "),
        ("learning_rate=0.1:0.01", "a range is LOW:HIGH or log:LOW:HIGH"),
        ("learning_rate=0.1:0.2:0.3", "a range is LOW:HIGH or log:LOW:HIGH"),
        ("learning_rate=exp:0.1:0.3", "'exp' is not of type float"),
        ("clip_grad_norm=none:1", "a range is LOW:HIGH or log:LOW:HIGH"),
        ("weight_decay=log:0:1", "a range is LOW:HIGH or log:LOW:HIGH, the latter of positive numbers"),
        ("seed=0,1", "seed cannot be searched: all trials share it"),
        ("num_epochs=1,2", "num_epochs cannot be searched: all trials share it"),
        ("checkpoint_every=10,20", "checkpoint_every cannot be searched: all trials share it"),
        (f"batch_size=1:{10**20}", f"--batch-size must be of type int, not {10**20}"),
    ],
)
def test_a_text_that_is_no_space_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        over(text)
    assert str(raised.value).startswith(f"--sweep {text}: {message}")


def test_the_default_configuration_has_the_values_of_a_recipe_or_a_file() -> None:
    found = space_of(Searched, {"learning_rate": 0.25, "width": 8, "plain": 9})
    assert found.defaults == {"batch_size": 32, "learning_rate": 0.25, "width": 8, "depth": 2, "kind": "a"}


def test_rounded_values_stay_in_their_range() -> None:
    points = propose("ema_decay=0.9:0.99999", sweep=SweepConfig(search_algorithm="grid", num_trials=3))
    assert [point.values["ema_decay"] for point in points] == [0.9, 0.95, 0.99999]


def test_a_long_list_of_values_is_refused_in_a_short_line() -> None:
    with pytest.raises(UsageError, match=r"^.{0,120}: more than 1,000 values; write a range, NAME=LOW:HIGH$"):
        over(f"batch_size={','.join(map(str, range(1, 1_000_001)))}")


def test_a_setting_is_searched_once_and_not_if_it_is_given() -> None:
    with pytest.raises(UsageError, match="--sweep searches beta1: name it only once, and without --set beta1"):
        over("beta1=0.5,0.6", "beta1=0.7,0.8")
    with pytest.raises(UsageError, match="--sweep searches beta1"):
        space_of(WORKLOAD, {"sweep": ["beta1=0.5,0.6"]}, fixed=["beta1"])
    assert list(space_of(WORKLOAD, {}, fixed=["batch_size"]).spaces) == ["learning_rate"]


def test_a_points_name_has_its_values_or_a_digest_if_that_is_too_long() -> None:
    assert point(9, 0.5, 4).name == "batch_size-9_learning_rate-0.5_seed-4"
    names = {Point(tuple((f"a_long_name_{n}", n + more) for n in range(50)), 3).name for more in (0, 1)}
    assert len(names) == 2
    assert all(len(name) < 60 and name.endswith("_seed-3") for name in names)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"kind": "a/b"}, {"kind": "a_b"}),
        ({"kind": None}, {"kind": "None"}),
        ({"kind": "x", "norm": "y_norm-z"}, {"kind": "x_norm-y", "norm": "z"}),
        ({"kind": "x" * 200 + "/"}, {"kind": "x" * 200 + "_"}),
    ],
)
def test_different_points_have_different_names(first: dict[str, Any], second: dict[str, Any]) -> None:
    names = [Point(tuple(values.items()), 0).name for values in (first, second)]
    assert names[0] != names[1]
    assert not any("/" in name for name in names)


def test_a_point_whose_texts_are_words_has_its_values_in_its_name() -> None:
    values = {"batch_size": 9, "size": 1e-05, "kind": "resnet_v1", "norm": None, "is_on": True}
    name = "batch_size-9_size-1e-05_kind-resnet_v1_norm-None_is_on-True_seed-0"
    assert Point(tuple(values.items()), 0).name == name


def test_a_range_may_be_one_value_and_booleans_and_none_are_read_back() -> None:
    assert {p.values["learning_rate"] for p in propose("learning_rate=1e-3:1e-3")} == {1e-3}

    class Odd(Searched):
        @dataclasses.dataclass(frozen=True)
        class Settings:
            residual: bool = setting(True, "shortcuts", search=Choice((True, False)))
            depth: int | None = setting(None, "layers", search=Choice((None, 8)))
            norm: str | None = setting(None, "normalization", search=Choice((None, "batch")))
            width: int = setting(8, "units", search=Range(8, 1e3, log=True))

    assert space_of(Odd, {"sweep": space_of(Odd, {}).texts()}) == space_of(Odd, {})
    found = space_of(Odd, {"sweep": ["residual=False", "depth=none,8", "norm=none,batch"]})
    drawn = points_of(found, SweepConfig(num_trials=20))
    assert {point.values["residual"] for point in drawn} == {False}
    assert {point.values["depth"] for point in drawn} == {None, 8}
    for each in drawn:
        as_text = {name: "" if value is None else str(value) for name, value in each.values.items()}
        assert found.configuration(as_text) == each.configuration
