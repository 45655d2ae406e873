"""The space of a sweep, what it proposes, and the names of members."""

import dataclasses
import math
from typing import Any

import pytest

from mnist_ray.config import SweepConfig
from mnist_ray.errors import UsageError
from mnist_ray.many.points import Point, Space, propose, space_of
from mnist_ray.settings import Choice, Range
from mnist_ray.workload import Workload, setting
from tests.conftest import mnist
from tests.many.conftest import point

WORKLOAD = type(mnist())
DEFAULT = point(*(WORKLOAD.recipes["default"][name] for name in ("batch_size", "learning_rate"))).configuration


class Searched(Workload):
    """A workload with its own settings to search, and another space for the learning rate."""

    @dataclasses.dataclass(frozen=True)
    class Settings:
        width: int = setting(16, "units", search=Choice((8, 16)))
        depth: int = setting(2, "layers", search=Range(1, 5))
        kind: str = setting("a", "kind", search=Choice(("a", "b")))
        residual: bool = setting(True, "shortcuts")
        norm: str | None = setting(None, "normalization")
        plain: int = setting(3, "not searched")

    search = {"learning_rate": Range(0.1, 1.0)}
    recipes = {"default": {"learning_rate": 0.5}}


def over(*texts: str) -> Space:
    """Return the space of these texts; by default the workload's."""
    return space_of(WORKLOAD, {"sweep": texts})


def proposed(
    space: Space, num_trials: int = 16, seed: int = 0, search_algorithm: Any = "random"
) -> list[dict[str, Any]]:
    sweep = SweepConfig(num_trials=num_trials, search_algorithm=search_algorithm)
    return [dict(configuration) for configuration in propose(space, sweep, seed)]


def test_random_proposals_start_with_the_default_stay_inside_and_depend_on_the_seed_alone() -> None:
    first, again, other = (proposed(over(), seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first[1:] != other[1:]
    many = proposed(over(), 200)
    assert (many[0], len(many)) == (dict(DEFAULT), 200)
    assert {values["batch_size"] for values in many} == {32, 64, 128, 256, 512}
    rates = [values["learning_rate"] for values in many]
    assert all(5e-4 <= rate <= 2e-2 for rate in rates)
    assert 70 < sum(rate < math.sqrt(5e-4 * 2e-2) for rate in rates) < 130, "not log-uniform"


@pytest.mark.parametrize(("text", "shares"), [("1:3", [1 / 3] * 3), ("log:1:3", [0.5, 0.29, 0.21])])
def test_whole_numbers_are_drawn_as_often_at_the_ends_of_a_range(text: str, shares: list[float]) -> None:
    drawn = proposed(over(f"warmup_steps={text}", "beta1=0.1:0.9"), 2000)[1:]  # beta1 makes configurations different
    numbers = [values["warmup_steps"] for values in drawn]
    assert [numbers.count(number) / len(numbers) for number in (1, 2, 3)] == pytest.approx(shares, abs=0.05)


def test_a_narrow_range_has_many_values_and_one_of_no_width_has_one() -> None:
    assert len({values["ema_decay"] for values in proposed(over("ema_decay=0.9999:0.99999"), 50)}) == 50
    assert {values["learning_rate"] for values in proposed(over("learning_rate=1e-3:1e-3"))} == {1e-3}


def test_a_default_outside_the_space_is_not_tried() -> None:
    rates = "learning_rate=log:5e-4:2e-2"
    for texts, is_tried in (
        (("batch_size=64,128", rates), True),
        (("batch_size=32,64", rates), False),
        (("batch_size=64,128", "learning_rate=6e-3:2e-2"), False),
    ):
        assert (dict(DEFAULT) in proposed(over(*texts))) == is_tried
    assert proposed(over("ema_decay=0.9:0.99"))[0]["ema_decay"] is not None


def test_a_space_up_to_a_number_has_this_number_in_place_of_larger_ones_also_as_the_default() -> None:
    less = over("batch_size=8:500", "beta1=0.5,0.6").up_to(100, "batch_size")
    assert less.texts() == ("batch_size=8:100", "beta1=0.5,0.6")
    assert less.default is None
    assert over().up_to(100, "batch_size").default == point(100, dict(DEFAULT)["learning_rate"]).configuration


def test_a_grid_has_each_combination_of_values() -> None:
    space = over("batch_size=32,64", "learning_rate=0.1,0.2,0.3")
    found = [(values["batch_size"], values["learning_rate"]) for values in proposed(space, 6, search_algorithm="grid")]
    assert found == [(32, 0.1), (32, 0.2), (32, 0.3), (64, 0.1), (64, 0.2), (64, 0.3)]
    with pytest.raises(UsageError, match=r"^--search-algorithm grid needs --num-trials 6 for all combinations$"):
        proposed(space, 5, search_algorithm="grid")
    with pytest.raises(UsageError, match=r"grid needs values, not a range: --sweep learning_rate=A,B,C$"):
        proposed(over(), search_algorithm="grid")


def test_a_workloads_settings_are_searched_with_the_jobs_from_the_values_of_a_recipe_or_a_file() -> None:
    found = space_of(Searched, {})
    assert found.defaults == {"batch_size": 32, "learning_rate": 0.5, "width": 16, "depth": 2, "kind": "a"}
    points = proposed(found, 100)
    assert {values["depth"] for values in points} == {1, 2, 3, 4, 5}
    assert {values["kind"] for values in points} == {"a", "b"}
    assert all(0.1 <= values["learning_rate"] <= 1.0 for values in points)
    found = space_of(Searched, {"learning_rate": 0.25, "width": 8, "plain": 9}, fixed=["batch_size", "plain"])
    assert found.defaults == {"learning_rate": 0.25, "width": 8, "depth": 2, "kind": "a"}


def test_only_named_settings_are_searched_and_their_texts_are_read_back() -> None:
    values = ["plain=1:9", "clip-grad-norm=none,0.5", 'kind="a,b", c,"""d"" e"', "residual=False", "norm=none,batch"]
    found = space_of(Searched, {"sweep": values})
    assert found.spaces == {
        "plain": Range(1, 9),
        "clip_grad_norm": Choice((None, 0.5)),
        "kind": Choice(("a,b", "c", '"d" e')),
        "residual": Choice((False,)),
        "norm": Choice((None, "batch")),
    }
    assert space_of(Searched, {"sweep": found.texts()}) == found
    assert over(*over().texts()) == over()
    for values_of_trial in proposed(found, 20):
        as_text = {name: "" if value is None else str(value) for name, value in values_of_trial.items()}
        assert dict(found.configuration(as_text)) == values_of_trial


COMMAS = "write A,B,C, with double quotes around a value that contains a comma"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size", "write NAME=A,B,C, NAME=LOW:HIGH or NAME=log:LOW:HIGH"),
        ("lerning_rate=1:2", "there is no setting lerning_rate; did you mean learning_rate?"),
        ("batch_size=32,32", "values must differ"),
        ("batch_size=0,1", "--batch-size must be at least 1, not 0"),
        ("batch_size=1.5", "'1.5' is not of type int"),
        ("optimizer=adam,lion", "--optimizer must be adam, "),
        ('optimizer="adam,sgd', COMMAS),
        ("optimizer=adam\nsgd", COMMAS),
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
def test_a_text_that_is_no_space_is_rejected(text: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        over(text)
    assert str(raised.value).startswith(f"--sweep {text}: {message}")


def test_a_setting_is_searched_once_and_not_if_it_is_given_and_only_over_a_choice_or_a_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError, match="--sweep searches beta1: name it only once, and without --set beta1"):
        over("beta1=0.5,0.6", "beta1=0.7,0.8")
    with pytest.raises(UsageError, match="--sweep searches beta1"):
        space_of(WORKLOAD, {"sweep": ["beta1=0.5,0.6"]}, fixed=["beta1"])
    assert list(space_of(WORKLOAD, {}, fixed=["batch_size"]).spaces) == ["learning_rate"]
    monkeypatch.setattr(Searched, "search", {"width": (8, 16)})
    with pytest.raises(UsageError, match=r"^the search space of width: \(8, 16\) is neither a Choice nor a Range$"):
        space_of(Searched, {})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"kind": "a/b"}, {"kind": "a_b"}),
        ({"kind": None}, {"kind": "None"}),
        ({"kind": "x", "norm": "y_norm-z"}, {"kind": "x_norm-y", "norm": "z"}),
        ({f"a_long_name_{n}": n for n in range(50)}, {f"a_long_name_{n}": n + 1 for n in range(50)}),
    ],
)
def test_different_points_have_different_names_of_folders(first: dict[str, Any], second: dict[str, Any]) -> None:
    names = [Point(tuple(values.items()), 0).name for values in (first, second)]
    assert names[0] != names[1]
    assert not any("/" in name or len(name) > 180 for name in names)


def test_a_point_whose_texts_are_words_has_its_values_in_its_name() -> None:
    values = {"batch_size": 9, "size": 1e-05, "kind": "resnet_v1", "norm": None, "is_on": True}
    name = "batch_size-9_size-1e-05_kind-resnet_v1_norm-None_is_on-True_seed-0_fold-2"
    assert Point(tuple(values.items()), 0, 2).name == name
